"""Kernels for groups that do not fit the registers of a program: a launch a round, each of which
reads the tensors again, with several programs a group (``reduce.py``). The first program of a group
stores its statistics."""

import triton
import triton.language as tl

from .epilogue import activated, masked, read_gradient, stored_sum, with_residual
from .layout import (
    Place,
    Tile,
    any_group,
    keep,
    locate_group,
    locate_tile,
    normals,
    parameter,
    read,
    real,
    tile_rows,
    write,
    zeros,
)
from .math import absolute, make_exponents, natural, needs_series
from .params import PER_RUN, number, numbers
from .reduce import (
    add,
    load_moments,
    merge_moments,
    save,
    stat,
    sum_partials,
    sum_zeros,
    total,
    write_partial,
)
from .resident import load_constants
from .rounds import (
    CURVATURE,
    LMBDA,
    MEAN,
    MEAN_D,
    MEAN_HD,
    MEAN_LOW,
    NOISE_SCALE,
    RSTD,
    finish_gradient,
    finish_lambda,
    gradient_round,
    input_gradient,
    lambda_round,
    rstd_of,
    transform_round,
)


@triton.jit
def stream_moments(tensors, part, geometry, programs, S: tl.constexpr):
    """Round 1. Each program sums around a pilot, the mean of its first tile, so that an offset of
    the data costs no precision; stores (count, mean, mean_low, sum of squares around the mean).
    Where there is a sum of input and residual, writes it; the later rounds read it."""
    split = tl.program_id(0) % programs
    place = locate_group(tl.program_id(0) // programs, geometry, S)
    tile = locate_tile(split * S.R, place, geometry, S)
    first = total(real(tile.inside, S) + zeros(S), S)
    u = read(tensors.input, place, tile, S)
    if tensors.sum.data is not None:
        u = real(stored_sum(u, tensors.residual, place, tile, S), S)
    pilot = total(u, S) / tl.where(first > 0, first, 1.0)
    counts, sums, squares = sum_zeros(S), sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(geometry, S), programs * S.R):
        tile = locate_tile(i, place, geometry, S)
        u = read(tensors.input, place, tile, S)
        if tensors.sum.data is not None:
            stored = stored_sum(u, tensors.residual, place, tile, S)
            write(tensors.sum, place, tile, stored, S)
            u = real(stored, S)
        d = keep(u - pilot, tile, S)
        counts = add(counts, real(tile.inside, S) + zeros(S), S)
        sums = add(sums, d, S)
        squares = add(squares, d * d, S)
    count, whole = total(counts, S), total(sums, S)
    offset = whole / tl.where(count > 0, count, 1.0)
    mean = pilot + offset
    write_partial(part, 0, count, split, programs, place, geometry)
    write_partial(part, 1, mean, split, programs, place, geometry)
    write_partial(part, 2, offset - (mean - pilot), split, programs, place, geometry)
    write_partial(part, 3, total(squares, S) - whole * offset, split, programs, place, geometry)


@triton.jit
def stream_lambda(
    input, stats, moment_part, part, geometry, splits,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    S: tl.constexpr,
):  # fmt: skip
    """Round 2; stores the sums of h d, sign(h) l, d and e - 3 t^2. Where the statistics tensor has
    the moments (``moment_part`` None), l is natural and e lacks t^2, as in the compiled kernels."""
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    split = tl.program_id(0) % splits.programs
    place = locate_group(tl.program_id(0) // splits.programs, geometry, S)
    if moment_part is None:
        mean, low, rstd = load_moments(stats, place, geometry)
    else:
        _, mean, low, squares = merge_moments(moment_part, splits.left, place, geometry, S)
        rstd = rstd_of(squares * n.inverse_count, n.eps, S.FAST)
        save(stats, MEAN, mean, split, place, geometry)
        save(stats, MEAN_LOW, low, split, place, geometry)
        save(stats, RSTD, rstd, split, place, geometry)
    hds, logs = sum_zeros(S), sum_zeros(S)
    ds, es = sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(geometry, S), splits.programs * S.R):
        tile = locate_tile(i, place, geometry, S)
        h = keep((read(input, place, tile, S) - mean) * rstd - low * rstd, tile, S)
        signed_log, hd, d, e = lambda_round(h, S.FAST)
        if moment_part is None:
            e += 2.0 * h * h
        hds = add(hds, hd, S)
        logs = add(logs, signed_log, S)
        ds = add(ds, d, S)
        es = add(es, e, S)
    log = total(logs, S)
    if moment_part is None:
        log = natural(log)
    write_partial(part, 0, total(hds, S), split, splits.programs, place, geometry)
    write_partial(part, 1, log, split, splits.programs, place, geometry)
    write_partial(part, 2, total(ds, S), split, splits.programs, place, geometry)
    write_partial(part, 3, total(es, S), split, splits.programs, place, geometry)


@triton.jit
def merge_lambda(stats, part, split, left, place, geometry, n, S: tl.constexpr):
    """(mean, offset, rstd, exponents, series) after round 2, whose sums are in ``part``; None: the
    statistics tensor has lambda."""
    mean, low, rstd = load_moments(stats, place, geometry)
    if part is None:
        lmbda = tl.load(stat(stats, LMBDA, place, geometry), mask=place.present, other=1.0)
    else:
        hd = sum_partials(part, 0, left, place, geometry, S)
        log = sum_partials(part, 1, left, place, geometry, S)
        d = sum_partials(part, 2, left, place, geometry, S)
        e = sum_partials(part, 3, left, place, geometry, S)
        lmbda, mean_hd, mean_d, q = finish_lambda((log, hd, d, e), rstd, n, S.ORDER)
        save(stats, LMBDA, lmbda, split, place, geometry)
        save(stats, MEAN_HD, mean_hd, split, place, geometry)
        save(stats, MEAN_D, mean_d, split, place, geometry)
        save(stats, CURVATURE, q, split, place, geometry)
    exponents = make_exponents(lmbda, n.transform_eps)
    return mean, -low * rstd, rstd, exponents, any_group(needs_series(exponents), S)


@triton.jit
def transformed(u, mean, offset, rstd, exponents, series, S: tl.constexpr):
    """x of a tile of the input."""
    h = (u - mean) * rstd + offset
    signed_log, _, _, _ = lambda_round(h, S.FAST)
    return transform_round(signed_log, exponents, series, S.FAST)


@triton.jit
def stream_x(
    input, stats, lambda_part, mean_part, part, geometry, splits,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    S: tl.constexpr,
):  # fmt: skip
    """Round 3 (``mean_part`` None) sums x, round 4 |x - mean(x)|."""
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    split = tl.program_id(0) % splits.programs
    place = locate_group(tl.program_id(0) // splits.programs, geometry, S)
    mean, offset, rstd, exponents, series = merge_lambda(
        stats, lambda_part, split, splits.left, place, geometry, n, S
    )
    if mean_part is None:
        centre = 0.0 * rstd
    else:
        centre = sum_partials(mean_part, 0, splits.left, place, geometry, S) * n.inverse_count
    sums = sum_zeros(S)
    for i in range(split * S.R, tile_rows(geometry, S), splits.programs * S.R):
        tile = locate_tile(i, place, geometry, S)
        u = read(input, place, tile, S)
        x = transformed(u, mean, offset, rstd, exponents, series, S)
        if mean_part is None:
            sums = add(sums, keep(x, tile, S), S)
        else:
            sums = add(sums, keep(absolute(x - centre), tile, S), S)
    write_partial(part, 0, total(sums, S), split, splits.programs, place, geometry)


@triton.jit
def frozen_constants(running, place, n, S: tl.constexpr):
    """(mean, rstd, lmbda, exponents) of channels with given statistics."""
    mean = real(tl.load(running.mean + place.inner, mask=place.present, other=0.0), S)
    var = real(tl.load(running.var + place.inner, mask=place.present, other=1.0), S)
    lmbda = real(tl.load(running.lmbda + place.inner, mask=place.present, other=1.0), S)
    one = tl.full([], 1.0, var.dtype)
    rstd = one / tl.sqrt(var + n.eps) + (var - var)
    return mean, rstd, lmbda, make_exponents(lmbda, n.transform_eps)


@triton.jit
def stream_output(
    tensors, stats, affine, noise, running, lambda_part, scale_part, geometry, splits,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    S: tl.constexpr,
):  # fmt: skip
    """Round 5, or the whole forward pass with given statistics. Over a shard (``lambda_part`` None)
    it stores no statistics."""
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    split = tl.program_id(0) % splits.programs
    place = locate_group(tl.program_id(0) // splits.programs, geometry, S)
    if S.FROZEN:
        mean, rstd, lmbda, exponents = frozen_constants(running, place, n, S)
        offset = 0.0 * rstd
        series = True
        if stats is not None:
            save(stats, MEAN, mean, split, place, geometry)
            save(stats, MEAN_LOW, offset, split, place, geometry)
            save(stats, RSTD, rstd, split, place, geometry)
            save(stats, LMBDA, lmbda, split, place, geometry)
            save(stats, MEAN_HD, offset, split, place, geometry)
            save(stats, MEAN_D, offset, split, place, geometry)
            save(stats, CURVATURE, offset, split, place, geometry)
    else:
        mean, offset, rstd, exponents, series = merge_lambda(
            stats, lambda_part, split, splits.left, place, geometry, n, S
        )
    scale = 0.0 * rstd
    if S.NOISE > 0:
        if noise.scale is not None:
            scale = tl.load(noise.scale + place.group, mask=place.present, other=0.0)
        else:
            scale = sum_partials(scale_part, 0, splits.left, place, geometry, S) * n.inverse_count
        key = tl.load(noise.seed)
        factor = n.noise_train * scale
    KEPT: tl.constexpr = stats is not None and (S.FROZEN or lambda_part is not None)
    if KEPT:
        save(stats, NOISE_SCALE, scale, split, place, geometry)
    for i in range(split * S.R, tile_rows(geometry, S), splits.programs * S.R):
        tile = locate_tile(i, place, geometry, S)
        u = read(tensors.input, place, tile, S)
        y = transformed(u, mean, offset, rstd, exponents, series, S)
        if S.NOISE > 0:
            y += factor * normals(key, noise.stream, place, tile, geometry.noise_run, S)
        w = parameter(affine.weight, 1.0, place, tile, geometry, S)
        b = parameter(affine.bias, 0.0, place, tile, geometry, S)
        y = with_residual(y * w + b, tensors.residual, place, tile, S)
        write(tensors.output, place, tile, activated(y, S), S)


@triton.jit
def stream_gradient(
    tensors, stats, weight, noise, sums_part, part, geometry, splits,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """With ``part``, the reduction of the backward pass: the five sums of gradient_round() and, if
    ``BIAS`` and ``WEIGHT``, those of the parameters. With an output, the gradient of the input from
    the totals in ``sums_part``, which is None if the statistics are given."""
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    split = tl.program_id(0) % splits.programs
    place = locate_group(tl.program_id(0) // splits.programs, geometry, S)
    mean, offset, rstd, scale, exponents, gradient, series = load_constants(
        stats, place, geometry, n, S
    )
    if sums_part is None:
        none = 0.0 * rstd
        totals = (none, none, none, none, none)
    else:
        totals = (
            sum_partials(sums_part, 0, splits.left, place, geometry, S),
            sum_partials(sums_part, 1, splits.left, place, geometry, S),
            sum_partials(sums_part, 2, splits.left, place, geometry, S),
            sum_partials(sums_part, 3, splits.left, place, geometry, S),
            sum_partials(sums_part, 4, splits.left, place, geometry, S),
        )
    finished = finish_gradient(totals, n.inverse_count, rstd, S.FROZEN)
    if S.NOISE > 0:
        key = tl.load(noise.seed)
        factor = n.noise_train * scale
    a, b, c, d, e = sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S)
    bias_sum, weight_sum = sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(geometry, S), splits.programs * S.R):
        tile = locate_tile(i, place, geometry, S)
        h = keep((read(tensors.input, place, tile, S) - mean) * rstd + offset, tile, S)
        g = read_gradient(tensors.grad, tensors.result, place, tile, S)
        weighted = g * parameter(weight, 1.0, place, tile, geometry, S)
        through_h, through_lambda, w, x = gradient_round(
            h, weighted, exponents, gradient, series, S.FAST
        )
        if part is not None:
            if not S.FROZEN:
                w = keep(w, tile, S)
                a = add(a, through_h, S)
                b = add(b, through_h * h, S)
                c = add(c, through_lambda, S)
                d = add(d, w, S)
                e = add(e, w * h, S)
            if BIAS:
                bias_sum = add(bias_sum, g, S)
            if WEIGHT:
                if S.NOISE > 0:
                    x += factor * normals(key, noise.stream, place, tile, geometry.noise_run, S)
                weight_sum = add(weight_sum, g * x, S)
        if tensors.output.data is not None:
            du = input_gradient(through_h, w, h, rstd, finished)
            du = with_residual(du, tensors.grad_sum, place, tile, S)
            write(tensors.output, place, tile, du, S)
    if part is not None:
        if not S.FROZEN:
            write_partial(part, 0, total(a, S), split, splits.programs, place, geometry)
            write_partial(part, 1, total(b, S), split, splits.programs, place, geometry)
            write_partial(part, 2, total(c, S), split, splits.programs, place, geometry)
            write_partial(part, 3, total(d, S), split, splits.programs, place, geometry)
            write_partial(part, 4, total(e, S), split, splits.programs, place, geometry)
        if BIAS:
            write_partial(part, 5, total(bias_sum, S), split, splits.programs, place, geometry)
        if WEIGHT:
            write_partial(part, 6, total(weight_sum, S), split, splits.programs, place, geometry)


@triton.jit
def parameter_sums(
    tensors, stats, noise, parts, geometry, rows, row_runs, programs,
    transform_eps: tl.float64, noise_train: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """The gradients of weights that vary within a group, where the pass over the group does not sum
    them: sums of g and of g (x + noise z), in ``parts[program, element of the parameter]``.

    PER_RUN: a program has one run of every outer index, which are the rows of its tiles. Else a
    program has L neighbouring elements of the run of all groups with one inner index; the rows of
    its tiles are runs.
    """
    inner, runs, length = geometry.inner, geometry.runs, geometry.length
    split = tl.program_id(0) % programs
    block = tl.program_id(0) // programs
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
        key = tl.load(noise.seed)
    for first_row in range(split * S.R, rows, programs * S.R):
        each = first_row + tl.arange(0, S.R)[:, None]
        outer = each // row_runs
        run = each - outer * row_runs + fixed_run
        present = each < rows
        strides = (geometry.noise_outer, geometry.noise_inner, geometry.noise_run)
        at_noise = row_offset(outer, which, run, strides)
        place = Place(outer * inner + which, outer, which, present, at_noise)
        mean, low, rstd = load_moments(stats, place, geometry)
        lmbda = tl.load(stat(stats, LMBDA, place, geometry), mask=present, other=1.0)
        scale = tl.load(stat(stats, NOISE_SCALE, place, geometry), mask=present, other=0.0)
        exponents = make_exponents(lmbda, number(transform_eps, S))
        if S.FROZEN:
            series = True
        else:
            series = any_group(needs_series(exponents), S)
        for chunk in range(columns):
            first = begin + chunk * S.L
            column = first + lane
            tile = Tile(0, first, column, column < length, present & (column < length))
            g = read_row(tensors.grad, outer, which, run, tile, S)
            if S.ACTIVATION > 0:
                result = read_row(tensors.result, outer, which, run, tile, S)
                g = masked(g, result, S)
            bias_sum += g
            if parts.weight is not None:
                u = read_row(tensors.input, outer, which, run, tile, S)
                x = transformed(u, mean, -low * rstd, rstd, exponents, series, S)
                if S.NOISE > 0:
                    z = normals(key, noise.stream, place, tile, 0, S)
                    x += number(noise_train, S) * scale * z
                weight_sum += tl.where(tile.mask, g * x, 0.0)
    if S.AFFINE == PER_RUN:
        at = tl.cast(split, tl.int64) * inner * runs + block
        if parts.weight is not None:
            tl.store(parts.weight + at, tl.sum(tl.sum(weight_sum, 1), 0))
        if parts.bias is not None:
            tl.store(parts.bias + at, tl.sum(tl.sum(bias_sum, 1), 0))
    else:
        element = begin + tl.arange(0, S.L)
        at = (tl.cast(split, tl.int64) * inner + which) * length + element
        if parts.weight is not None:
            tl.store(parts.weight + at, tl.sum(weight_sum, 0), mask=element < length)
        if parts.bias is not None:
            tl.store(parts.bias + at, tl.sum(bias_sum, 0), mask=element < length)


@triton.jit
def row_offset(outer, inner, run, strides):
    by_outer, by_inner, by_run = strides
    within = tl.cast(inner, tl.int64) * by_inner + tl.cast(run, tl.int64) * by_run
    return tl.cast(outer, tl.int64) * by_outer + within


@triton.jit
def read_row(operand, outer, inner, run, tile, S: tl.constexpr):
    """A tile whose rows are runs anywhere."""
    at = operand.data + row_offset(outer, inner, run, operand.strides) + tile.column
    return real(tl.load(at, mask=tile.mask, other=0.0), S)
