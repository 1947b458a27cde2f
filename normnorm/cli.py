"""The command line: ``normnorm COMMAND`` or ``python -m normnorm COMMAND``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import normnorm
from normnorm import bench, demo, doctor, experiments, gradcheck
from normnorm.bench import report
from normnorm.commands import CommandError
from normnorm.experiments import study

__all__ = ["main"]

_COMMANDS = {
    "doctor": (doctor, "versions, backends, and a check of each against the reference"),
    "gradcheck": (gradcheck, "gradients of every layer, backend and dtype"),
    "bench": (bench, "time every layer beside torch's, compiled and copied; compare result files"),
    "report": (report, "render benchmark results as a page, plots or Markdown"),
    "demo": (demo, "train small networks with and without normality normalization"),
    "train": (experiments, "train a network with a choice of normalization layer"),
    "study": (study, "compare norms on handwritten digits over many seeds"),
}
_EXTRAS = {
    "bench": "bench", "report": "bench", "demo": "demo", "train": "experiments",
    "study": "experiments",
}  # fmt: skip
# What a shell shows for a program that SIGINT or SIGPIPE ended.
_INTERRUPTED, _NO_READER = 130, 141


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normnorm", description="Normality normalization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=normnorm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        module.add_arguments(commands.add_parser(name, help=summary, description=summary))
    return parser


def _discard_output() -> None:
    """Sends to nowhere what a stream cannot write: its flush at exit would raise once more."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; its exit status.

    Returns:
        0 for success; 1 for a miss; 2 for what cannot be done, with a sentence on stderr; 130
        where it was interrupted; 141 where its output is read no further.
    """
    command = ""
    try:
        try:
            parsed = _parser().parse_args(arguments)
            command = parsed.command
            return _COMMANDS[command][0].run(parsed)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # what fails is to fail here, and not after the last handler
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    except KeyboardInterrupt as stop:
        sentence, status = f"interrupted; {stop}" if str(stop) else "interrupted", _INTERRUPTED
    except CommandError as error:
        sentence, status = str(error), 2
    except ModuleNotFoundError as error:
        if command not in _EXTRAS or str(error.name).startswith("normnorm"):
            raise
        extra = f"pip install 'normnorm[{_EXTRAS[command]}]'"
        sentence, status = f"{error.name} is not installed: {extra}", 2
    except OSError as error:
        if error.strerror is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        sentence, status = f"{where}{error.strerror}", 2
    with suppress(OSError):
        print(f"normnorm {command}".rstrip() + f": {sentence}", file=sys.stderr)
    _discard_output()
    return status
