"""Where and how the numbers came about."""

from __future__ import annotations

import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import torch

import normnorm
from normnorm import backends

__all__ = ["environment"]


def _cpu() -> str:
    """The processor's name; Python itself knows only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def environment() -> dict[str, str | int]:
    """Versions, processor, threads, backend, and the command line."""
    return {
        "command_line": shlex.join(sys.argv),
        "normnorm": normnorm.__version__,
        "torch": torch.__version__,
        "scikit-learn": version("scikit-learn"),
        "matplotlib": version("matplotlib"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "backend": backends.resolve(torch.device("cpu")).name,
    }
