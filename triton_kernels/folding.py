"""The sums over parts that end a reduction, in a fixed order: equal inputs give equal bits."""

import triton
import triton.language as tl

ROWS, COLUMNS = 64, 32  # of a tile of parts


@triton.jit
def fold_parts(
    part, other_part, output, other_output, rows, columns, R: tl.constexpr, L: tl.constexpr
):
    """``output[c]`` = the sum of ``part[:, c]``, and the same for the second pair (or None)."""
    column = tl.program_id(0) * L + tl.arange(0, L)[None, :]
    if tl.program_id(1) == 0:
        fold_one(part, output, rows, columns, column, R)
    else:
        fold_one(other_part, other_output, rows, columns, column, R)


@triton.jit
def fold_one(part, output, rows, columns, column, R: tl.constexpr):
    if output is not None:
        acc = tl.load(part + column + tl.zeros([R, 1], tl.int64), mask=column < 0, other=0.0)
        for first in range(0, rows, R):
            each = first + tl.arange(0, R)[:, None]
            at = tl.cast(each, tl.int64) * columns + column
            acc += tl.load(part + at, mask=(each < rows) & (column < columns), other=0.0)
        sums = tl.sum(acc, 0)[None, :]
        tl.store(output + column, sums, mask=column < columns)


@triton.jit
def fold_sums(part, folded, splits, groups, R: tl.constexpr, L: tl.constexpr):
    """``folded[k, g]`` = the sum of ``part[k, :, g]``."""
    k = tl.cast(tl.program_id(1), tl.int64)
    column = tl.program_id(0) * L + tl.arange(0, L)[None, :]
    fold_one(part + k * splits * groups, folded + k * groups, splits, groups, column, R)
