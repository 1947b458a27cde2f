"""Exported graphs without our ops: what each op is in PyTorch's own operations.

A program exported by ``torch.export`` calls ``torch.ops.normnorm.*``, and runs wherever normnorm
is installed. For a runtime that knows PyTorch's operations alone, the table of
:func:`decompositions` replaces them by the definition.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from normnorm import ops
from normnorm.backends import reference

__all__ = ["decompositions"]


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """The ops of this package by the definition in ``normnorm/reference.py``.

    For ``ExportedProgram.run_decompositions`` (alone, or together with torch's own:
    ``{**torch.export.default_decompositions(), **normnorm.decompositions()}``), ``make_fx`` and
    whatever else takes a table of decompositions. What it gives holds PyTorch's operations alone,
    and can be compiled ahead of time (``torch._inductor.aoti_compile_and_package``) for programs
    without Python. ``torch.onnx.export`` needs no table: it sees the definition by itself.

    A graph exported in training mode folds its running statistics by a mutating op, which torch
    wraps before any table is asked; export it under ``normnorm.use_backend("reference")``, and
    nothing of ours is in it from the start.

    Returns:
        A new dictionary, from each op to a function of the same arguments.
    """
    return {
        ops.normal_norm_forward: reference.normal_norm_forward,
        ops.normal_norm_backward: reference.normal_norm_backward,
        ops.normal_norm_infer: reference.normal_norm_infer,
        ops.add_normal_norm_forward: reference.add_normal_norm_forward,
        ops.add_normal_norm_backward: reference.add_normal_norm_backward,
        ops.fold_running_: reference.fold_running_,
    }
