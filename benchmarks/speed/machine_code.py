"""Instructions an element of the CUDA kernels, as their machine code was counted for the tests."""

from __future__ import annotations

import json
from pathlib import Path

from speed.results import Count, Mode, Operation

__all__ = ["cuda_counts"]

# How the counts are named, and which pass and mode of a layer with a weight each stands for.
_PASSES: dict[str, tuple[Operation, Mode]] = {
    "forward": ("forward", "quiet"),
    "forward_noise": ("forward", "noise"),
    "backward_weight": ("backward", "quiet"),
    "backward_noise": ("backward", "noise"),
}


def cuda_counts(capability: tuple[int, int]) -> list[Count]:
    """The stored counts for an architecture, of a group that one block holds in registers.

    They are kept with the tests that hold the kernels to them, in a checkout of the repository;
    empty without one, and for an architecture that was not counted.
    """
    stored = Path(__file__).resolve().parents[2] / "tests" / "data" / "sass_budgets.json"
    if not stored.exists():
        return []
    by_compiler = json.loads(stored.read_text(encoding="utf-8"))
    newest = max(by_compiler, key=lambda version: tuple(map(int, version.split("."))))
    isa = f"sm_{capability[0]}{capability[1]}"
    counts = []
    for name, found in by_compiler[newest].get(isa, {}).items():
        kernel, _, dtype = name.rpartition("_")
        if kernel in _PASSES:
            operation, mode = _PASSES[kernel]
            counts.append(
                Count(
                    work=f"CUDA kernel, {dtype}, group in registers", mode=mode,
                    operation=operation, isa=isa, dtype=dtype, instructions=found["instructions"],
                )
            )  # fmt: skip
    return counts
