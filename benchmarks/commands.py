"""Checks of options, devices and output files before any work, for all scripts."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from normnorm import backends
from normnorm.cli import CommandError


def positive(kind: type[int] | type[float], words: str) -> Callable[[str], Any]:
    """For argparse: a finite number above 0; ``words`` say so in the message."""

    def parse(text: str) -> int | float:
        try:
            number = kind(text)
        except ValueError:
            number = 0
        if not 0 < number < float("inf"):
            raise argparse.ArgumentTypeError(f"must be {words}; got {text!r}")
        return number

    return parse


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
    """CommandError where a file cannot be written: the path is a folder, or its parent is missing
    or read-only."""
    folder = path.resolve().parent
    if path.is_dir():
        raise CommandError(f"{option} {path} is a folder; a file's name is wanted")
    if not folder.is_dir():
        raise CommandError(f"{option} {path}: there is no folder {folder}")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise CommandError(f"{option} {path} cannot be written: permission denied")


def check_folder(path: Path) -> None:
    """CommandError where a folder cannot be written to or made: a file is in the way, or permission
    is missing. Makes nothing."""
    there = path.resolve()
    while not os.path.lexists(there):
        there = there.parent
    if not there.is_dir():
        raise CommandError(f"cannot write to {path}: {there} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise CommandError(f"cannot write to {path}: permission denied")
