"""The command line: ``normnorm COMMAND`` or ``python -m normnorm COMMAND``."""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from . import __version__, doctor, selfcheck

_COMMANDS = {
    "doctor": (doctor, "versions, backends, and a check of each against the reference"),
    "gradcheck": (selfcheck, "gradients of every layer, backend and dtype"),
}


# Shell statuses of programs that SIGINT or SIGPIPE ended.
_INTERRUPTED, _NO_READER = 130, 141


class CommandError(ValueError):
    """An error message for the user: the reason why a command cannot run."""


def execute(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments, calls ``run`` and returns the exit status.

    Args:
        parser: its ``set_defaults`` has ``run`` (from namespace to exit status), ``program`` (the
            prefix of error messages; default ``parser.prog``) and ``extra`` (the extra that
            installs the imports of ``run``; None if torch suffices).
        arguments: default ``sys.argv[1:]``.

    Returns:
        0 for success; 1 for a failed check; 2 for an invalid request, with a message on stderr; 130
        for an interrupt; 141 for a closed stdout.
    """
    parsed = argparse.Namespace()
    try:
        try:
            parser.parse_args(arguments, parsed)
            return parsed.run(parsed)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()  # here, because a flush at exit would raise outside the handlers
    except BrokenPipeError:
        _discard_output()
        return _NO_READER
    except KeyboardInterrupt as stop:
        sentence, status = f"interrupted; {stop}" if str(stop) else "interrupted", _INTERRUPTED
    except CommandError as error:
        sentence, status = str(error), 2
    except ModuleNotFoundError as error:
        extra = getattr(parsed, "extra", None)
        if extra is None or str(error.name).startswith(str(__package__)):
            raise
        sentence, status = f"{error.name} is not installed: pip install 'normnorm[{extra}]'", 2
    except OSError as error:
        if error.strerror is None:
            raise
        where = "" if error.filename is None else f"{error.filename}: "
        sentence, status = f"{where}{error.strerror}", 2
    with suppress(OSError):
        print(f"{getattr(parsed, 'program', parser.prog)}: {sentence}", file=sys.stderr)
    _discard_output()
    return status


def _discard_output() -> None:
    """Redirects streams that cannot be written to os.devnull, or a flush at exit would raise."""
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
    """Runs one command and returns its exit status (:func:`execute`)."""
    parser = argparse.ArgumentParser(
        prog="normnorm", description="Normality normalization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, program=command.prog)
    return execute(parser, arguments)
