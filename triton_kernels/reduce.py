"""Sums: over the tiles of a program, over the programs of a group, and over the groups that share a
parameter or a running statistic. Nothing is atomic, and every order is fixed: equal inputs give
equal bits.

The programs of a group store partial sums in a workspace ``part[k, program, group]``. The next
kernel adds them up before it begins; where there are too many for that (few columns, so many
programs each), ``reduce_moments`` and ``reduce_sums`` do so in between.
"""

import triton
import triton.language as tl

from .layout import locate_group
from .params import COLUMNS
from .rounds import LMBDA, MEAN, MEAN_LOW, RSTD

ROWS, COLUMNS_OF_SUMS = 64, 32  # of a tile of partial sums
RUNNING_CHANNELS = 128  # of a program


# --- the tiles of a program ----------------------------------------------------------------------


@triton.jit
def sum_zeros(S: tl.constexpr):
    """An accumulator for add() and total()."""
    R: tl.constexpr = S.R
    L: tl.constexpr = S.L if S.LAYOUT == COLUMNS else S.L // S.LANES
    if S.DOUBLE:
        return tl.zeros([R, L], tl.float64)
    else:
        return tl.zeros([R, L], tl.float32)


@triton.jit
def add(sums, x, S: tl.constexpr):
    """Adds a tile to sum_zeros(), first the elements of a row that one thread holds, so that a sum
    takes one register a thread, not one an element."""
    R: tl.constexpr = S.R
    L: tl.constexpr = S.L
    LANES: tl.constexpr = S.LANES
    if S.LAYOUT == COLUMNS or LANES == 1:
        return sums + x
    else:
        return sums + tl.sum(tl.reshape(x, [R, L // LANES, LANES]), 2)


@triton.jit
def total(x, S: tl.constexpr):
    """The sum of a tile over each group."""
    if S.LAYOUT == COLUMNS:
        return tl.sum(x, 0)[None, :]
    elif S.SINGLE:
        return tl.sum(x)
    else:
        return tl.sum(x, 1)[:, None]


# --- the programs of a group ---------------------------------------------------------------------


@triton.jit
def stat(stats, row, place, geometry):
    """Where a row of the statistics tensor holds a program's groups."""
    return stats + tl.cast(geometry.groups, tl.int64) * row + place.group


@triton.jit
def load_moments(stats, place, geometry):
    """(mean, mean_low, rstd) of a program's groups."""
    mean = tl.load(stat(stats, MEAN, place, geometry), mask=place.present, other=0.0)
    low = tl.load(stat(stats, MEAN_LOW, place, geometry), mask=place.present, other=0.0)
    rstd = tl.load(stat(stats, RSTD, place, geometry), mask=place.present, other=0.0)
    return mean, low, rstd


@triton.jit
def save(stats, row, value, split, place, geometry):
    """Stores a statistic in a group's first program."""
    if split == 0:
        tl.store(stat(stats, row, place, geometry), value, mask=place.present)


@triton.jit
def write_partial(part, k: tl.constexpr, value, split, programs, place, geometry):
    at = (tl.cast(programs, tl.int64) * k + split) * geometry.groups
    tl.store(part + at + place.group, value, mask=place.present)


@triton.jit
def partials(part, k: tl.constexpr, left, place, geometry, S: tl.constexpr):
    """The ``left`` partial sums number k of a group: (SPLITS,), or (SPLITS, L) in COLUMNS."""
    at = tl.cast(left, tl.int64) * k * geometry.groups
    each = tl.arange(0, S.SPLITS)
    if S.LAYOUT == COLUMNS:
        each = each[:, None]
        mask = (each < left) & place.present
        return tl.load(part + at + each * geometry.groups + place.group, mask=mask, other=0.0)
    else:
        at_each = part + at + each * geometry.groups + place.group
        return tl.load(at_each, mask=each < left, other=0.0)


@triton.jit
def over_partials(x, S: tl.constexpr):
    if S.LAYOUT == COLUMNS:
        return tl.sum(x, 0)[None, :]
    else:
        return tl.sum(x, 0)


@triton.jit
def sum_partials(part, k: tl.constexpr, left, place, geometry, S: tl.constexpr):
    return over_partials(partials(part, k, left, place, geometry, S), S)


@triton.jit
def merge_moments(part, left, place, geometry, S: tl.constexpr):
    """(count, mean, mean_low, sum of squares around the mean) of all programs of a group. Means are
    taken relative to the first program's, so that nothing cancels."""
    at = tl.cast(left, tl.int64) * geometry.groups
    pilot = tl.load(part + at + place.group, mask=place.present, other=0.0)
    count = partials(part, 0, left, place, geometry, S)
    delta = partials(part, 1, left, place, geometry, S) - pilot
    delta += partials(part, 2, left, place, geometry, S)
    squares = partials(part, 3, left, place, geometry, S) + count * delta * delta
    counted = over_partials(count, S)
    # the mean of a program without elements is undefined
    offset = over_partials(tl.where(count > 0, count * delta, 0.0), S) / tl.where(
        counted > 0, counted, 1.0
    )
    squares = over_partials(tl.where(count > 0, squares, 0.0), S) - counted * offset * offset
    mean = pilot + offset
    return counted, mean, offset - (mean - pilot), squares


@triton.jit
def reduce_moments(part, reduced, geometry, left, S: tl.constexpr):
    """The moments of many programs as those of one."""
    place = locate_group(tl.program_id(0), geometry, S)
    count, mean, low, squares = merge_moments(part, left, place, geometry, S)
    write_partial(reduced, 0, count, 0, 1, place, geometry)
    write_partial(reduced, 1, mean, 0, 1, place, geometry)
    write_partial(reduced, 2, low, 0, 1, place, geometry)
    write_partial(reduced, 3, squares, 0, 1, place, geometry)


@triton.jit
def reduce_sums(part, reduced, left, groups, R: tl.constexpr, L: tl.constexpr):
    """``reduced[k, g]`` = the sum of ``part[k, :, g]``."""
    k = tl.cast(tl.program_id(1), tl.int64)
    column = tl.program_id(0) * L + tl.arange(0, L)[None, :]
    sum_columns(part + k * left * groups, reduced + k * groups, left, groups, column, R)


# --- parameters and running statistics -----------------------------------------------------------


@triton.jit
def reduce_parameters(parts, outputs, rows, columns, R: tl.constexpr, L: tl.constexpr):
    """``outputs.weight[c]`` = the sum of ``parts.weight[:, c]``, and the same for the bias; either
    may be None."""
    column = tl.program_id(0) * L + tl.arange(0, L)[None, :]
    if tl.program_id(1) == 0:
        sum_columns(parts.weight, outputs.weight, rows, columns, column, R)
    else:
        sum_columns(parts.bias, outputs.bias, rows, columns, column, R)


@triton.jit
def sum_columns(part, output, rows, columns, column, R: tl.constexpr):
    if output is not None:
        acc = tl.load(part + column + tl.zeros([R, 1], tl.int64), mask=column < 0, other=0.0)
        for first in range(0, rows, R):
            each = first + tl.arange(0, R)[:, None]
            at = tl.cast(each, tl.int64) * columns + column
            acc += tl.load(part + at, mask=(each < rows) & (column < columns), other=0.0)
        sums = tl.sum(acc, 0)[None, :]
        tl.store(output + column, sums, mask=column < columns)


@triton.jit
def fold_running(
    stats, running, tracked, strides, at_stats, channels, repeats,
    momentum: tl.float64, unbias: tl.float64, eps: tl.float64,
    CUMULATIVE: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Moves the running statistics towards a batch's, in float64, with the CPU's results.
    ``tracked`` is None or the counter of batches, which was advanced before if the average is
    CUMULATIVE and is advanced here if not."""
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
    fold(running.mean, channel, mean * share, factor, strides.mean, present)
    unbiased = var * share * tl.full([], unbias, tl.float64)
    fold(running.var, channel, unbiased, factor, strides.var, present)
    fold(running.lmbda, channel, lmbda * share, factor, strides.lmbda, present)
    ADVANCE: tl.constexpr = tracked is not None and not CUMULATIVE
    if ADVANCE:
        counter = tl.load(tracked)
        tl.store(tracked, counter + 1, mask=tl.program_id(0) == 0)


@triton.jit
def fold(buffer, channel, value, factor, stride, present):
    at = buffer + tl.cast(channel, tl.int64) * stride
    old = tl.load(at, mask=present, other=0.0)
    if old.dtype == tl.float64:
        tl.store(at, old + factor * (value - old), mask=present)
    else:  # half types by way of float32, as torch converts them
        old = old.to(tl.float32).to(tl.float64)
        tl.store(at, (old + factor * (value - old)).to(tl.float32), mask=present)
