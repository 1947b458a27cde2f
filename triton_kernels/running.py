"""Folding a batch's statistics into the running ones, in float64: a handful of numbers, and the
same result as on the CPU."""

import triton
import triton.language as tl

from .rounds import LMBDA, MEAN, MEAN_LOW, RSTD


@triton.jit
def fold(buffer, channel, value, factor, stride, present):
    at = buffer + tl.cast(channel, tl.int64) * stride
    old = tl.load(at, mask=present, other=0.0)
    if old.dtype == tl.float64:
        tl.store(at, old + factor * (value - old), mask=present)
    else:  # half types by way of float32, as torch converts them
        old = old.to(tl.float32).to(tl.float64)
        tl.store(at, (old + factor * (value - old)).to(tl.float32), mask=present)


@triton.jit
def fold_running(
    stats, running_mean, running_var, running_lmbda, tracked, strides, at_stats, channels, repeats,
    momentum: tl.float64, unbias: tl.float64, eps: tl.float64,
    CUMULATIVE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """``tracked`` is None, or the counter: read where the average is CUMULATIVE (it was advanced
    before), else advanced here."""
    channel = tl.program_id(0) * L + tl.arange(0, L)
    present = channel < channels
    by_row, by_group = at_stats
    mean = tl.zeros([L], tl.float64)
    var = tl.zeros([L], tl.float64)
    lmbda = tl.zeros([L], tl.float64)
    for repeat in range(repeats):
        at = stats + (tl.cast(repeat, tl.int64) * channels + channel) * by_group
        rstd = tl.load(at + RSTD * by_row, mask=present, other=1.0).to(tl.float64)
        mean += tl.load(at + MEAN * by_row, mask=present, other=0.0).to(tl.float64)
        mean += tl.load(at + MEAN_LOW * by_row, mask=present, other=0.0).to(tl.float64)
        biased = 1.0 / (rstd * rstd) - tl.full([], eps, tl.float64)
        var += tl.where(biased < 0, 0.0, biased)
        lmbda += tl.load(at + LMBDA * by_row, mask=present, other=0.0).to(tl.float64)
    if CUMULATIVE:
        factor = 1.0 / tl.load(tracked).to(tl.float64)
    else:
        factor = tl.full([], momentum, tl.float64)
    share = 1.0 / tl.cast(repeats, tl.float64)
    fold(running_mean, channel, mean * share, factor, strides[0], present)
    unbiased = var * share * tl.full([], unbias, tl.float64)
    fold(running_var, channel, unbiased, factor, strides[1], present)
    fold(running_lmbda, channel, lmbda * share, factor, strides[2], present)
    ADVANCE: tl.constexpr = tracked is not None and not CUMULATIVE
    if ADVANCE:
        counter = tl.load(tracked)
        tl.store(tracked, counter + 1, mask=tl.program_id(0) == 0)
