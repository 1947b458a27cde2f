"""Shared by the command line and the scripts in benchmarks/: one way from arguments to an exit
status, and checks of devices and files before any work is done."""

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

# What a shell shows for a program that SIGINT or SIGPIPE ended.
_INTERRUPTED, _NO_READER = 130, 141


class CommandError(ValueError):
    """A sentence for the user: why a command cannot do what was asked."""


def execute(parser: argparse.ArgumentParser, arguments: Sequence[str] | None = None) -> int:
    """Parses the arguments and calls ``run`` with them; the exit status.

    Args:
        parser: whose ``set_defaults`` gives ``run`` (namespace to exit status), ``program`` (the
            name before an error's sentence; default ``parser.prog``) and ``extra`` (the extra that
            installs what ``run`` imports; None where torch is enough).
        arguments: default ``sys.argv[1:]``.

    Returns:
        0 for success; 1 for a miss; 2 for what cannot be done, with a sentence on stderr; 130
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
                sys.stdout.flush()  # a flush at exit would fail after the last handler
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
    """Points streams that cannot be written at os.devnull: their flush at exit would raise."""
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
    """The device of that name, once a tensor could be made on it and a backend serves it.

    Args:
        text: "cpu", "cuda", "cuda:1", ...; None for a GPU where there is one, else the CPU.
        backend: whether the backend that would be chosen must be one that can run.

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
    """Refuses a file that cannot be written, before there is anything to write.

    Raises:
        CommandError: a folder has that name, or its own folder is missing or read-only.
    """
    folder = path.resolve().parent
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; a file's name is wanted")
    if not folder.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"{option} {path} cannot be written: permission denied")


def check_folder(path: Path) -> None:
    """Refuses a folder that cannot be written to or made, and makes nothing.

    Raises:
        CommandError: a file is in the way, or there is no permission.
    """
    there = path.resolve()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise CommandError(f"cannot write to {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write to {path}: permission denied")
