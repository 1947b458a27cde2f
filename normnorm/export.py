"""Decomposition of normnorm's ops for exported graphs.

A program exported by ``torch.export`` calls ``torch.ops.normnorm.*`` and needs normnorm installed.
The table of :func:`decompositions` replaces these ops by the definition in PyTorch's operations.
"""

from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload

from . import ops
from .backends import reference


def decompositions() -> dict[OpOverload, Callable[..., Any]]:
    """normnorm's ops decomposed by the definition in ``normnorm/reference.py``.

    For ``ExportedProgram.run_decompositions`` (alone, or with torch's own:
    ``{**torch.export.default_decompositions(), **normnorm.decompositions()}``), ``make_fx`` and
    other users of decomposition tables. The decomposed graph has PyTorch operations only and can be
    compiled ahead of time (``torch._inductor.aoti_compile_and_package``) for programs without
    Python. ``torch.onnx.export`` needs no table: it traces the definition.

    A graph exported in training mode updates its running statistics by a mutating op, which torch
    wraps before it applies a table: use ``normnorm.use_backend("reference")`` for such an export.

    Returns:
        A new dictionary, from each op to a function of the same arguments.
    """
    return {
        ops.normal_norm_forward: reference.normal_norm_forward,
        ops.normal_norm_backward: reference.normal_norm_backward,
        ops.fold_running_: reference.fold_running_,
    }
