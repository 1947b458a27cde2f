"""The compiled CPU kernels: where their library is found, and what it says of itself."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

__all__ = ["DEVICE_TYPE", "NAME", "info", "library", "text", "unavailable_reason"]

NAME = "cpu"
DEVICE_TYPE = "cpu"
LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"


def _load() -> str | None:
    """Loads the library, whose ops then are ``torch.ops.normnorm_cpu``; why not, if it cannot."""
    if not LIBRARY.exists():
        return (
            "the compiled kernels were not built at installation (no C++ compiler, or "
            "NORMNORM_NATIVE=0); reinstall with a compiler to have them"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels do not load into torch {torch.__version__}: {error}"
    return None


_reason = _load()


def unavailable_reason() -> str | None:
    """None where the kernels are there; else one sentence that says why not."""
    return _reason


def library() -> ctypes.CDLL:
    """The library, for what it says of itself."""
    return ctypes.CDLL(str(LIBRARY))


def text(function: str) -> str:
    """What a function of the library that returns a text returns."""
    call = getattr(library(), function)
    call.restype = ctypes.c_char_p
    return str(call().decode())


def info() -> dict[str, str | int]:
    """What runs: the instruction set chosen, the compiler and its flags, torch's threads."""
    if _reason is not None:
        return {"unavailable": _reason}
    return {
        "isa": text("normnorm_cpu_isa"),
        "build": text("normnorm_build"),
        "threads": torch.get_num_threads(),
    }
