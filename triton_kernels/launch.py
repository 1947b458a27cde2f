"""The ops: what they accept, and which pass serves them. Argument order of ``ops.py``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from normnorm.backends import reference
from normnorm.checks import check_backward, check_fold, check_forward, check_residual
from normnorm.config import Config

from . import running
from .backward import Backward
from .forward import run_forward
from .problem import device_of
from .table import ceil_div

__all__ = [
    "add_normal_norm_backward",
    "add_normal_norm_forward",
    "fold_running_",
    "normal_norm_backward",
    "normal_norm_forward",
    "normal_norm_infer",
]

RUNNING_CHANNELS = 128
_NONE = (None, None, None)  # no running statistics


def normal_norm_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """``normnorm::normal_norm_forward``."""
    config = Config(*arguments)
    given = (running_mean, running_var, running_lmbda)
    check_forward(input, given, weight, bias, residual, seed, noise_scale, config)
    if input.numel() == 0:
        return reference.normal_norm_forward(
            input, *given, weight, bias, residual, seed, noise_scale, *arguments
        )
    output, _, stats = run_forward(
        input, given, weight, bias, residual, False, seed, noise_scale, config, True
    )
    assert stats is not None
    return output, stats


def normal_norm_infer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """``normnorm::normal_norm_infer``."""
    config = Config.from_infer(*arguments)
    given = (running_mean, running_var, running_lmbda)
    check_forward(input, given, weight, bias, residual, None, None, config)
    if input.numel() == 0:
        return torch.empty_like(input)
    return run_forward(input, given, weight, bias, residual, False, None, None, config, False)[0]


def add_normal_norm_forward(
    input: Tensor,
    residual: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::add_normal_norm_forward``."""
    config = Config(*arguments)
    check_residual(input, residual)
    check_forward(input, _NONE, weight, bias, None, seed, noise_scale, config)
    if input.numel() == 0:
        return reference.add_normal_norm_forward(
            input, residual, weight, bias, seed, noise_scale, *arguments
        )
    output, sum, stats = run_forward(
        input, _NONE, weight, bias, residual, True, seed, noise_scale, config, True
    )
    assert sum is not None
    assert stats is not None
    return output, sum, stats


def normal_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    frozen: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::normal_norm_backward``; a gradient not asked for is an empty tensor."""
    config = Config(*arguments)
    check_backward(
        grad_output, input, stats, weight, bias, output, seed, needs_weight, needs_bias, config
    )
    needs = (needs_input, needs_weight, needs_bias)
    if input.numel() == 0 or not any(needs):
        return reference.normal_norm_backward(
            grad_output, input, stats, weight, bias, output, seed, *needs, frozen, *arguments
        )
    return Backward(
        grad_output, None, input, stats, weight, bias, output, seed, needs, frozen, config
    ).run()


def add_normal_norm_backward(
    grad_output: Tensor,
    grad_sum: Tensor,
    sum: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output: Tensor | None,
    seed: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::add_normal_norm_backward``; a gradient not asked for is an empty tensor."""
    config = Config(*arguments)
    check_backward(
        grad_output, sum, stats, weight, bias, output, seed, needs_weight, needs_bias, config,
        grad_sum,
    )  # fmt: skip
    needs = (needs_input, needs_weight, needs_bias)
    if sum.numel() == 0 or not any(needs):
        return reference.add_normal_norm_backward(
            grad_output, grad_sum, sum, stats, weight, bias, output, seed, *needs, *arguments
        )
    return Backward(
        grad_output, grad_sum, sum, stats, weight, bias, output, seed, needs, False, config
    ).run()


def fold_running_(
    stats: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_lmbda: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    eps: float,
    backend: str,
) -> None:
    """``normnorm::fold_running_``: moves the running statistics towards a batch's, in place."""
    check_fold(
        stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps
    )
    channels = running_mean.size(0)
    cumulative = momentum is None
    if cumulative and num_batches_tracked is not None:
        num_batches_tracked.add_(1)  # before every program reads it
    strides = tuple(t.stride(0) for t in (running_mean, running_var, running_lmbda))
    with device_of(stats):
        running.fold_running[(ceil_div(channels, RUNNING_CHANNELS),)](
            stats, running_mean, running_var, running_lmbda, num_batches_tracked, strides,
            stats.stride(), channels, stats.size(1) // channels,
            0.0 if momentum is None else momentum, count / (count - 1), eps,
            CUMULATIVE=cumulative, L=RUNNING_CHANNELS,
        )  # fmt: skip
