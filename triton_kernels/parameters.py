"""The gradients of weights that vary within a group, where the pass over the group does not sum
them itself. No atomics, so that equal inputs give equal bits."""

import triton
import triton.language as tl

from .core import make_exponents, needs_care
from .joined import masked
from .resident import row
from .streaming import transformed
from .walk import PER_RUN, anywhere, normals, number, read, zeros


@triton.jit
def parameter_sums(
    grad, input, stats, seed, weight_part, bias_part, result, walk, at_grad, at_input, at_result,
    at_noise, rows, row_runs, stream, splits,
    transform_eps: tl.float64, noise_train: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Sums of g and g (x + noise z), in ``*_part[split, element of the parameter]``.

    A weight an element of the run: a program has L neighbouring elements of the run of every
    group of one inner index; its tile's rows are runs. A weight a run: a program has one run of
    every outer index, its tile's rows are those.
    """
    _, inner, runs, length, _, _, _ = walk
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    if S.AFFINE == PER_RUN:
        which, fixed_run = block // runs, block % runs
        columns = tl.cdiv(length, S.L)
        begin = 0
    else:
        blocks = tl.cdiv(length, S.L)
        which, fixed_run = block // blocks, 0
        begin = (block - which * blocks) * S.L
        columns = 1
    lane = tl.arange(0, S.L)[None, :]
    weight_sum, bias_sum = zeros(S), zeros(S)
    if S.NOISE > 0:
        key = tl.load(seed)
    for first_row in range(split * S.R, rows, splits * S.R):
        each = first_row + tl.arange(0, S.R)[:, None]
        outer = each // row_runs
        run = each - outer * row_runs + fixed_run
        present = each < rows
        group = outer * inner + which
        place = (group, outer, which, 0, present)
        mean = tl.load(row(stats, 0, place, walk), mask=present, other=0.0)
        low = tl.load(row(stats, 1, place, walk), mask=present, other=0.0)
        rstd = tl.load(row(stats, 2, place, walk), mask=present, other=0.0)
        lmbda = tl.load(row(stats, 3, place, walk), mask=present, other=1.0)
        scale = tl.load(row(stats, 4, place, walk), mask=present, other=0.0)
        exponents = make_exponents(lmbda, number(transform_eps, S))
        if S.FROZEN:
            careful = True
        else:
            careful = anywhere(needs_care(exponents), S)
        at = offset(outer, which, run, at_input)
        at_g = offset(outer, which, run, at_grad)
        at_n = offset(outer, which, run, at_noise)
        if S.RELU:
            at_r = offset(outer, which, run, at_result)
        for chunk in range(columns):
            first = begin + chunk * S.L
            column = first + lane
            tile = (0, first, column, column < length, present & (column < length))
            g = read(grad, at_g, at_grad, tile, S)
            if S.RELU:
                g = masked(g, read(result, at_r, at_result, tile, S))
            bias_sum += g
            if weight_part is not None:
                u = read(input, at, at_input, tile, S)
                x = transformed(u, mean, -low * rstd, rstd, exponents, careful, S)
                if S.NOISE > 0:
                    z = normals(key, stream, at_n, 0, tile, S)
                    x += number(noise_train, S) * scale * z
                weight_sum += tl.where(tile[4], g * x, 0.0)
    if S.AFFINE == PER_RUN:
        at_part = tl.cast(split, tl.int64) * inner * runs + block
        if weight_part is not None:
            tl.store(weight_part + at_part, tl.sum(tl.sum(weight_sum, 1), 0))
        if bias_part is not None:
            tl.store(bias_part + at_part, tl.sum(tl.sum(bias_sum, 1), 0))
    else:
        element = begin + tl.arange(0, S.L)
        at_part = (tl.cast(split, tl.int64) * inner + which) * length + element
        if weight_part is not None:
            tl.store(weight_part + at_part, tl.sum(weight_sum, 0), mask=element < length)
        if bias_part is not None:
            tl.store(bias_part + at_part, tl.sum(bias_sum, 0), mask=element < length)


@triton.jit
def offset(outer, inner, run, strides):
    by_outer, by_inner, by_run = strides
    within = tl.cast(inner, tl.int64) * by_inner + tl.cast(run, tl.int64) * by_run
    return tl.cast(outer, tl.int64) * by_outer + within
