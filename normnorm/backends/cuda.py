"""The CUDA kernels of the compiled library: whether they can run here, and why not."""

from __future__ import annotations

__all__ = ["DEVICE_TYPE", "NAME", "register", "unavailable_reason"]

NAME = "cuda"
DEVICE_TYPE = "cuda"


def unavailable_reason() -> str | None:
    """None where the kernels can run; else one sentence that says why not."""
    return "this version's CUDA kernels are not bound to torch yet"


def register() -> None:
    """Takes the kernels into the registry."""
