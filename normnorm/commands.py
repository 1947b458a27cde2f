"""Shared by the command line and the scripts in benchmarks/: from arguments to an exit status, and
checks of devices and files before any work."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch

from normnorm import backends

__all__ = ["CommandError", "check_folder", "check_output", "execute", "usable_device"]

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
            status: int = parsed.run(parsed)
            return status
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
        if extra is None or str(error.name).startswith("normnorm"):
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
    """Redirects streams that cannot be written to os.devnull, or their flush at exit would
    raise."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except OSError:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream.fileno())
                os.close(nowhere)


def usable_device(text: str | None, backend: bool = True) -> torch.device:
    """The named device, after checks that it holds tensors and a backend supports it.

    Args:
        text: "cpu", "cuda", "cuda:1", ...; None for a GPU if there is one, else the CPU.
        backend: whether to check that the selected backend can run.

    Raises:
        CommandError: no such device, no data on it ("meta"), or no backend for it.
    """
    if text is None:
        text = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(text)
    except RuntimeError:
        raise CommandError(f"--device must be cpu, cuda, cuda:1, ...; got {text!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device {text}: torch sees no CUDA device here")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {text}: there are {torch.cuda.device_count()} CUDA devices")
    try:
        torch.ones(1, dtype=torch.float64, device=device).item()
    except (AssertionError, ImportError, RuntimeError, TypeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CommandError(f"--device {text}: {reason}") from None
    if backend:
        try:
            backends.resolve(device)
        except (RuntimeError, ValueError) as error:
            raise CommandError(str(error)) from None
    return device


def check_output(option: str, path: Path) -> None:
    """Raises if a file cannot be written, before any work.

    Raises:
        CommandError: the path is a folder, or its parent is missing or read-only.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; a file's name is wanted")
    if not folder.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"{option} {path} cannot be written: permission denied")


def check_folder(path: Path) -> None:
    """Raises if a folder cannot be written to or made; makes nothing.

    Raises:
        CommandError: a file is in the way, or permission is missing.
    """
    there = path.resolve()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise CommandError(f"cannot write to {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write to {path}: permission denied")
