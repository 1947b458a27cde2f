"""The compiled CPU kernels: where their library is found, and what it says of itself."""

import ctypes
from pathlib import Path

import torch

from ..namespace import OWNS_COMPILED, PACKAGE
from ..noise import STREAM_VERSION

NAME = "cpu"
DEVICE_TYPE = "cpu"
LIBRARY = Path(__file__).resolve().parent.parent / "_C.abi3.so"
WITHOUT = LIBRARY.with_name("_C.txt")  # where setup.py says why there is no library


def _without() -> tuple[str, str]:
    """Whether the library was "left out" or "failed" to build, and why; empty where not known."""
    text = WITHOUT.read_text(encoding="utf-8").strip() if WITHOUT.exists() else ""
    outcome, _, reason = text.partition(": ")
    return outcome, reason


def build_failure() -> str | None:
    """What failed, in one line, where the last build of the library did not succeed; else None."""
    outcome, reason = _without()
    return reason if outcome == "failed" else None


def left_out() -> bool:
    """Whether there is no library on purpose: left out at installation, or not this copy's."""
    return not OWNS_COMPILED or _without()[0] == "left out"


def library() -> ctypes.CDLL:
    """The library by ctypes, for the functions that describe it."""
    return ctypes.CDLL(str(LIBRARY))


def _load() -> str | None:
    """Loads the library, whose ops then are ``torch.ops.normnorm_cpu``; why not, if it cannot."""
    if not OWNS_COMPILED:
        return f"the compiled kernels serve the package normnorm, and this copy is {PACKAGE}"
    if not LIBRARY.exists():
        outcome, reason = _without()
        if outcome == "failed":
            return f"the build of the compiled kernels failed: {reason}"
        if outcome == "left out":
            return f"the compiled kernels were left out at installation: {reason}"
        return (
            f"{LIBRARY.parent} has no compiled kernels, so that CPU tensors take plain PyTorch, "
            "many times slower: install normnorm or, if it is installed, start Python outside its "
            "source folder"
        )
    try:
        torch.ops.load_library(str(LIBRARY))
    except (OSError, RuntimeError) as error:
        return f"the compiled kernels do not load into torch {torch.__version__}: {error}"
    version = getattr(library(), "normnorm_stream_version", lambda: 1)()
    if version != STREAM_VERSION:
        return (
            f"the compiled kernels draw version {version} of the noise and this package draws "
            f"version {STREAM_VERSION}: rebuild them by installing normnorm again"
        )
    return None


_reason = _load()


def unavailable_reason() -> str | None:
    """None where the kernels are there; else one sentence that says why not."""
    return _reason


def text(function: str) -> str:
    """The string that a C function of the library without arguments returns."""
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
