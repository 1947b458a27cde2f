"""Launches of the forward pass: one for groups that a program holds, else one a round."""

from __future__ import annotations

import torch
from torch import Tensor

from normnorm.config import Config
from normnorm.statistics import Row, statistics_dtype

from . import resident, streaming
from .problem import (
    ABSENT,
    FOLD_MOMENTS,
    Numbers,
    Operand,
    Problem,
    dense_parameter,
    device_of,
    find_problem,
    make_numbers,
    promised,
    stream_word,
)
from .table import ceil_div

__all__ = ["run_forward"]


def run_forward(
    input: Tensor, given: tuple[Tensor | None, ...], weight: Tensor | None, bias: Tensor | None,
    residual: Tensor | None, adds: bool, seed: Tensor | None, noise_scale: Tensor | None,
    config: Config, keep: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """(output, sum, statistics): the sum of input and residual where the pass ``adds`` before it
    normalizes, the statistics where they are to be kept or a later launch wants them."""
    frozen, noisy = given[0] is not None, config.noise_train > 0.0
    output = torch.empty_like(input)
    tensors = (input, output) if residual is None else (input, output, residual)
    p = find_problem(input, tensors, config, noisy, False, frozen, False)
    x, y = p.read(input, 0), p.written(output, 1)
    joined = ABSENT if residual is None else p.read(residual, 2)
    sum = p.written(torch.empty_like(input), 1) if adds else ABSENT
    stats = None
    if keep or not (p.resident or frozen):
        dtype = statistics_dtype(input.dtype)
        stats = torch.empty(len(Row), p.layout.groups, dtype=dtype, device=input.device)
    weight, bias, noise_scale = (dense_parameter(t) for t in (weight, bias, noise_scale))
    numbers, noise, stream = make_numbers(config, p.layout), p.noise, stream_word(config)
    with device_of(input):
        if p.resident:
            resident.forward[(p.blocks,)](
                x.tensor, y.tensor, stats, weight, bias, seed, noise_scale, joined.tensor,
                sum.tensor, p.walk, x.at, y.at, joined.at, sum.at, noise, stream, *numbers, p.spec,
                num_warps=p.plan.warps,
            )  # fmt: skip
        else:
            parts: tuple[Tensor | None, Tensor | None] = (None, None)
            if not frozen:
                assert stats is not None
                part = stats.new_empty(10, p.plan.splits, p.layout.groups)
                moments = _moments(x, joined, sum, part[:4], p)
                if adds:
                    x, joined = sum, ABSENT
                scales = noisy and noise_scale is None
                parts = _statistics(x, stats, moments, part[4:], p, numbers, scales)
            channels = tuple(dense_parameter(t) for t in given)
            streaming.stream_output[(p.blocks * p.plan.splits,)](
                x.tensor, y.tensor, stats, weight, bias, seed, noise_scale, *channels, *parts,
                joined.tensor, p.walk, x.at, y.at, joined.at, noise, stream, p.plan.splits,
                p.parts_given, *numbers, p.spec, num_warps=p.plan.warps,
            )  # fmt: skip
    return promised(y, input), promised(sum, input) if adds else None, stats


def _moments(x: Operand, joined: Operand, sum: Operand, part: Tensor, p: Problem) -> Tensor:
    """Round 1: the parts of the moments. The residual is nothing to it unless a sum is written."""
    splits = p.plan.splits
    if sum.tensor is None:
        joined = ABSENT
    streaming.stream_moments[(p.blocks * splits,)](
        x.tensor, part, joined.tensor, sum.tensor, p.walk, x.at, joined.at, sum.at, p.noise,
        splits, p.spec, num_warps=p.plan.warps,
    )  # fmt: skip
    if p.fold is None:
        return part
    moments = part.new_empty(4, p.layout.groups)
    blocks = p.layout.outer * ceil_div(p.layout.inner, FOLD_MOMENTS)
    streaming.fold_moments[(blocks,)](part, moments, p.walk, splits, p.fold, num_warps=8)
    return moments


def _statistics(
    x: Operand, stats: Tensor, moments: Tensor, part: Tensor, p: Problem, numbers: Numbers,
    scales: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rounds 2 to 4: the parts of lambda's sums and, where asked for, of the noise ``scales``."""
    splits, given, warps = p.plan.splits, p.parts_given, p.plan.warps
    grid = (p.blocks * splits,)
    lambdas, means, deviations = part[:4], part[4:5], part[5:]
    streaming.stream_lambda[grid](
        x.tensor, stats, moments, lambdas, p.walk, x.at, p.noise, splits, given, *numbers[:2],
        p.spec, num_warps=warps,
    )  # fmt: skip
    lambdas = p.folded(lambdas)
    if not scales:
        return lambdas, None
    before = None
    for sums in (means, deviations):
        streaming.stream_x[grid](
            x.tensor, stats, lambdas, before, sums, p.walk, x.at, p.noise, splits, given,
            *numbers[:5], p.spec, num_warps=warps,
        )  # fmt: skip
        before = p.folded(sums)
    return lambdas, before
