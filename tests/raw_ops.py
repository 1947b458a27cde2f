"""Argument lists of the raw ops, by keyword."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

NONE = (None, None, None)


def forward(
    config: Sequence[Any], input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    *, running: Sequence[Tensor | None] = NONE, residual: Tensor | None = None,
    seed: Tensor | None = None, noise_scale: Tensor | None = None, prenorm: bool = False,
    keep_stats: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Of ``normal_norm_forward``."""
    return (
        input, *running, weight, bias, residual, seed, noise_scale, prenorm, keep_stats, *config
    )  # fmt: skip


def backward(
    config: Sequence[Any], grad_output: Tensor, input: Tensor, stats: Tensor,
    weight: Tensor | None = None, bias: Tensor | None = None, *, output: Tensor | None = None,
    seed: Tensor | None = None, grad_sum: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True), frozen: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Of ``normal_norm_backward``."""
    return (
        grad_output, input, stats, weight, bias, output, seed, grad_sum, *needs, frozen, *config
    )  # fmt: skip
