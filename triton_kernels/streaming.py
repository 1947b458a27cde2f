"""Kernels for groups that fit into no program's registers: a launch a round, each reading the
tensors again, each group shared out over SPLITS programs.

A program leaves its sums in ``part[k, split, group]``; whichever kernel comes next adds up a
group's parts before it begins, and its first program notes the result in the statistics. Where
there are too many parts for that (few columns, so many programs each), a small kernel adds
them up in between, and ``parts_given`` is 1.
"""

import triton
import triton.language as tl

from .core import absolute, make_exponents, needs_care
from .joined import activated, read_gradient, stored_sum, with_residual
from .resident import load_constants, row
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
from .walk import (
    COLUMNS,
    add,
    anywhere,
    group_offset,
    keep,
    locate_group,
    locate_tile,
    noise_offset,
    normals,
    number,
    parameter,
    read,
    real,
    sum_zeros,
    total,
    write,
    zeros,
)


@triton.jit
def tile_rows(walk, S: tl.constexpr):
    """Rows of tiles that a group has."""
    _, _, runs, _, chunks, _, _ = walk
    if S.WALK == COLUMNS:
        return runs
    else:
        return runs * chunks


@triton.jit
def write_part(part, k: tl.constexpr, value, split, splits, place, walk):
    at = (tl.cast(splits, tl.int64) * k + split) * walk[0]
    tl.store(part + at + place[0], value, mask=place[4])


@triton.jit
def parts(part, k: tl.constexpr, splits, place, walk, S: tl.constexpr):
    """Sum number k of all programs of a group: (SPLITS,), or (SPLITS, L) in columns."""
    at = tl.cast(splits, tl.int64) * k * walk[0]
    each = tl.arange(0, S.SPLITS)
    if S.WALK == COLUMNS:
        each = each[:, None]
        mask = (each < splits) & place[4]
        return tl.load(part + at + each * walk[0] + place[0], mask=mask, other=0.0)
    else:
        return tl.load(part + at + each * walk[0] + place[0], mask=each < splits, other=0.0)


@triton.jit
def over_parts(x, S: tl.constexpr):
    if S.WALK == COLUMNS:
        return tl.sum(x, 0)[None, :]
    else:
        return tl.sum(x, 0)


@triton.jit
def sum_parts(part, k: tl.constexpr, splits, place, walk, S: tl.constexpr):
    return over_parts(parts(part, k, splits, place, walk, S), S)


@triton.jit
def note(stats, which, value, split, place, walk):
    """A number of a group, written by the group's first program."""
    if split == 0:
        tl.store(row(stats, which, place, walk), value, mask=place[4])


@triton.jit
def stream_moments(
    input, part, residual, sum, walk, at_input, at_residual, at_sum, at_noise, splits,
    S: tl.constexpr,
):  # fmt: skip
    """Round 1. Each program sums around a pilot of its own, the mean of its first tile, so that an
    offset of the data costs no digits; leaves (count, mean, what rounding it lost, sum of squares
    around it). Where there is a ``sum``, of the input and the residual, that is written, and is
    what the later rounds read."""
    split = tl.program_id(0) % splits
    place = locate_group(tl.program_id(0) // splits, walk, S)
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    tile = locate_tile(split * S.R, place, walk, noise, at_noise[2], S)
    first = total(real(tile[3], S) + zeros(S), S)
    u = read(input, at, at_input, tile, S)
    if sum is not None:
        u = real(stored_sum(u, residual, place, at_residual, tile, S), S)
    pilot = total(u, S) / tl.where(first > 0, first, 1.0)
    counts, sums, squares = sum_zeros(S), sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(walk, S), splits * S.R):
        tile = locate_tile(i, place, walk, noise, at_noise[2], S)
        u = read(input, at, at_input, tile, S)
        if sum is not None:
            stored = stored_sum(u, residual, place, at_residual, tile, S)
            write(sum, group_offset(place, at_sum, S), at_sum, tile, stored, S)
            u = real(stored, S)
        d = keep(u - pilot, tile, S)
        counts = add(counts, real(tile[3], S) + zeros(S), S)
        sums = add(sums, d, S)
        squares = add(squares, d * d, S)
    count, whole = total(counts, S), total(sums, S)
    shift = whole / tl.where(count > 0, count, 1.0)
    mean = pilot + shift
    write_part(part, 0, count, split, splits, place, walk)
    write_part(part, 1, mean, split, splits, place, walk)
    write_part(part, 2, shift - (mean - pilot), split, splits, place, walk)
    write_part(part, 3, total(squares, S) - whole * shift, split, splits, place, walk)


@triton.jit
def merge_moments(part, splits, place, walk, S: tl.constexpr):
    """(count, mean, mean_low, sum of squares) of all programs: around the first one's mean, so
    that nothing cancels."""
    at = tl.cast(splits, tl.int64) * walk[0]
    pilot = tl.load(part + at + place[0], mask=place[4], other=0.0)
    count = parts(part, 0, splits, place, walk, S)
    delta = parts(part, 1, splits, place, walk, S) - pilot + parts(part, 2, splits, place, walk, S)
    squares = parts(part, 3, splits, place, walk, S) + count * delta * delta
    counted = over_parts(count, S)
    # a split without elements has no mean to speak of
    shift = over_parts(tl.where(count > 0, count * delta, 0.0), S) / tl.where(
        counted > 0, counted, 1.0
    )
    squares = over_parts(tl.where(count > 0, squares, 0.0), S) - counted * shift * shift
    mean = pilot + shift
    return counted, mean, shift - (mean - pilot), squares


@triton.jit
def fold_moments(part, folded, walk, splits, S: tl.constexpr):
    """The moments of SPLITS programs as those of one, where there are too many for whoever comes
    next to add up by itself."""
    place = locate_group(tl.program_id(0), walk, S)
    count, mean, low, squares = merge_moments(part, splits, place, walk, S)
    write_part(folded, 0, count, 0, 1, place, walk)
    write_part(folded, 1, mean, 0, 1, place, walk)
    write_part(folded, 2, low, 0, 1, place, walk)
    write_part(folded, 3, squares, 0, 1, place, walk)


@triton.jit
def stream_lambda(
    input, stats, moment_part, part, walk, at_input, at_noise, splits,
    parts_given, inverse_count: tl.float64, eps: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Round 2; leaves the sums of h d, sign(h) l, d and e - 3 t^2."""
    split = tl.program_id(0) % splits
    place = locate_group(tl.program_id(0) // splits, walk, S)
    _, mean, low, squares = merge_moments(moment_part, parts_given, place, walk, S)
    rstd = rstd_of(squares * number(inverse_count, S), number(eps, S), S.FAST)
    note(stats, MEAN, mean, split, place, walk)
    note(stats, MEAN_LOW, low, split, place, walk)
    note(stats, RSTD, rstd, split, place, walk)
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    slopes, logs = sum_zeros(S), sum_zeros(S)
    shifts, curvatures = sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(walk, S), splits * S.R):
        tile = locate_tile(i, place, walk, noise, at_noise[2], S)
        h = keep((read(input, at, at_input, tile, S) - mean) * rstd - low * rstd, tile, S)
        signed_log, slope, shift, curvature = lambda_round(h, S.FAST)
        slopes = add(slopes, slope, S)
        logs = add(logs, signed_log, S)
        shifts = add(shifts, shift, S)
        curvatures = add(curvatures, curvature, S)
    write_part(part, 0, total(slopes, S), split, splits, place, walk)
    write_part(part, 1, total(logs, S), split, splits, place, walk)
    write_part(part, 2, total(shifts, S), split, splits, place, walk)
    write_part(part, 3, total(curvatures, S), split, splits, place, walk)


@triton.jit
def merge_lambda(stats, part, split, splits, place, walk, numbers, S: tl.constexpr):
    """(mean, shift, rstd, exponents, careful) once round 2 is done."""
    inverse_count, eps, root_eps, alpha, transform_eps = numbers
    mean = tl.load(row(stats, MEAN, place, walk), mask=place[4], other=0.0)
    low = tl.load(row(stats, MEAN_LOW, place, walk), mask=place[4], other=0.0)
    rstd = tl.load(row(stats, RSTD, place, walk), mask=place[4], other=0.0)
    lmbda, slope, shift, q = finish_lambda(
        sum_parts(part, 0, splits, place, walk, S), sum_parts(part, 1, splits, place, walk, S),
        sum_parts(part, 2, splits, place, walk, S), sum_parts(part, 3, splits, place, walk, S),
        rstd, inverse_count, alpha, eps, root_eps, S.ORDER,
    )  # fmt: skip
    note(stats, LMBDA, lmbda, split, place, walk)
    note(stats, MEAN_HD, slope, split, place, walk)
    note(stats, MEAN_D, shift, split, place, walk)
    note(stats, CURVATURE, q, split, place, walk)
    exponents = make_exponents(lmbda, transform_eps)
    return mean, -low * rstd, rstd, exponents, anywhere(needs_care(exponents), S)


@triton.jit
def transformed(u, mean, shift, rstd, exponents, careful, S: tl.constexpr):
    """x of a tile of the input."""
    h = (u - mean) * rstd + shift
    signed_log, _, _, _ = lambda_round(h, S.FAST)
    return transform_round(signed_log, exponents, careful, S.FAST)


@triton.jit
def stream_x(
    input, stats, lambda_part, mean_part, part, walk, at_input, at_noise, splits,
    parts_given, inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64,
    alpha: tl.float64, transform_eps: tl.float64,
    S: tl.constexpr,
):  # fmt: skip
    """Round 3 (``mean_part`` None): sums x. Round 4: sums |x - mean(x)|."""
    split = tl.program_id(0) % splits
    place = locate_group(tl.program_id(0) // splits, walk, S)
    count = number(inverse_count, S)
    numbers = (
        count, number(eps, S), number(root_eps, S), number(alpha, S), number(transform_eps, S)
    )  # fmt: skip
    mean, shift, rstd, exponents, careful = merge_lambda(
        stats, lambda_part, split, parts_given, place, walk, numbers, S
    )
    if mean_part is None:
        centre = 0.0 * rstd
    else:
        centre = sum_parts(mean_part, 0, parts_given, place, walk, S) * count
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    sums = sum_zeros(S)
    for i in range(split * S.R, tile_rows(walk, S), splits * S.R):
        tile = locate_tile(i, place, walk, noise, at_noise[2], S)
        u = read(input, at, at_input, tile, S)
        x = transformed(u, mean, shift, rstd, exponents, careful, S)
        if mean_part is None:
            sums = add(sums, keep(x, tile, S), S)
        else:
            sums = add(sums, keep(absolute(x - centre), tile, S), S)
    write_part(part, 0, total(sums, S), split, splits, place, walk)


@triton.jit
def frozen_constants(
    running_mean, running_var, running_lmbda, place, eps, transform_eps, S: tl.constexpr
):
    """(mean, rstd, lmbda, exponents) of channels with given statistics."""
    mean = real(tl.load(running_mean + place[2], mask=place[4], other=0.0), S)
    var = real(tl.load(running_var + place[2], mask=place[4], other=1.0), S)
    lmbda = real(tl.load(running_lmbda + place[2], mask=place[4], other=1.0), S)
    one = tl.full([], 1.0, var.dtype)
    return mean, one / tl.sqrt(var + eps) + (var - var), lmbda, make_exponents(lmbda, transform_eps)


@triton.jit
def stream_output(
    input, output, stats, weight, bias, seed, noise_scale, running_mean, running_var, running_lmbda,
    lambda_part, scale_part, residual, walk, at_input, at_output, at_residual, at_noise, stream,
    splits, parts_given,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64,
    noise_train: tl.float64, S: tl.constexpr,
):  # fmt: skip
    """Round 5; also the whole of a frozen layer's forward pass."""
    split = tl.program_id(0) % splits
    place = locate_group(tl.program_id(0) // splits, walk, S)
    count, epsilon = number(inverse_count, S), number(eps, S)
    if S.FROZEN:
        mean, rstd, lmbda, exponents = frozen_constants(
            running_mean, running_var, running_lmbda, place, epsilon, number(transform_eps, S), S
        )
        shift = 0.0 * rstd
        careful = True
        if stats is not None:
            note(stats, MEAN, mean, split, place, walk)
            note(stats, MEAN_LOW, shift, split, place, walk)
            note(stats, RSTD, rstd, split, place, walk)
            note(stats, LMBDA, lmbda, split, place, walk)
            note(stats, MEAN_HD, shift, split, place, walk)
            note(stats, MEAN_D, shift, split, place, walk)
            note(stats, CURVATURE, shift, split, place, walk)
    else:
        numbers = (count, epsilon, number(root_eps, S), number(alpha, S), number(transform_eps, S))
        mean, shift, rstd, exponents, careful = merge_lambda(
            stats, lambda_part, split, parts_given, place, walk, numbers, S
        )
    scale = 0.0 * rstd
    if S.NOISE > 0:
        if noise_scale is not None:
            scale = tl.load(noise_scale + place[0], mask=place[4], other=0.0)
        else:
            scale = sum_parts(scale_part, 0, parts_given, place, walk, S) * count
        key = tl.load(seed)
        factor = number(noise_train, S) * scale
    if stats is not None:
        note(stats, NOISE_SCALE, scale, split, place, walk)
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    at_o = group_offset(place, at_output, S)
    for i in range(split * S.R, tile_rows(walk, S), splits * S.R):
        tile = locate_tile(i, place, walk, noise, at_noise[2], S)
        u = read(input, at, at_input, tile, S)
        y = transformed(u, mean, shift, rstd, exponents, careful, S)
        if S.NOISE > 0:
            y += factor * normals(key, stream, noise, at_noise[2], tile, S)
        w = parameter(weight, 1.0, place, tile, walk, S)
        b = parameter(bias, 0.0, place, tile, walk, S)
        y = with_residual(y * w + b, residual, place, at_residual, tile, S)
        write(output, at_o, at_output, tile, activated(y, S), S)


@triton.jit
def stream_gradient(
    grad, input, stats, weight, seed, output, sums_part, part, result, grad_sum, walk, at_grad,
    at_input, at_output, at_result, at_grad_sum, at_noise, stream, splits, parts_given,
    inverse_count: tl.float64, alpha: tl.float64, transform_eps: tl.float64,
    noise_train: tl.float64,
    WEIGHT: tl.constexpr, BIAS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """With ``part``, the backward reduction: leaves the five sums of gradient_round() and, where
    ``WEIGHT`` and ``BIAS`` ask for them, those of the parameters. With ``output``, the gradient of
    the input, from the totals in ``sums_part`` unless the layer is frozen; ``grad_sum`` adds to it.
    ``result`` is what the forward pass gave."""
    split = tl.program_id(0) % splits
    place = locate_group(tl.program_id(0) // splits, walk, S)
    mean, shift, rstd, scale, exponents, gradient, careful = load_constants(
        stats, place, walk, number(alpha, S), number(transform_eps, S), S
    )
    if sums_part is None:
        none = 0.0 * rstd
        totals = (none, none, none, none, none)
    else:
        totals = (
            sum_parts(sums_part, 0, parts_given, place, walk, S),
            sum_parts(sums_part, 1, parts_given, place, walk, S),
            sum_parts(sums_part, 2, parts_given, place, walk, S),
            sum_parts(sums_part, 3, parts_given, place, walk, S),
            sum_parts(sums_part, 4, parts_given, place, walk, S),
        )
    finished = finish_gradient(totals, number(inverse_count, S), rstd, S.FROZEN)
    if S.NOISE > 0:
        key = tl.load(seed)
        factor = number(noise_train, S) * scale
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    at_g = group_offset(place, at_grad, S)
    at_o = group_offset(place, at_output, S)
    a, b, c, d, e = sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S)
    bias_sum, weight_sum = sum_zeros(S), sum_zeros(S)
    for i in range(split * S.R, tile_rows(walk, S), splits * S.R):
        tile = locate_tile(i, place, walk, noise, at_noise[2], S)
        h = keep((read(input, at, at_input, tile, S) - mean) * rstd + shift, tile, S)
        g = read_gradient(grad, at_g, at_grad, result, place, at_result, tile, S)
        weighted = g * parameter(weight, 1.0, place, tile, walk, S)
        through_h, through_lambda, w, x = gradient_round(
            h, weighted, exponents, gradient, careful, S.FAST
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
                    x += factor * normals(key, stream, noise, at_noise[2], tile, S)
                weight_sum = add(weight_sum, g * x, S)
        if output is not None:
            du = input_gradient(through_h, w, h, rstd, finished)
            du = with_residual(du, grad_sum, place, at_grad_sum, tile, S)
            write(output, at_o, at_output, tile, du, S)
    if part is not None:
        if not S.FROZEN:
            write_part(part, 0, total(a, S), split, splits, place, walk)
            write_part(part, 1, total(b, S), split, splits, place, walk)
            write_part(part, 2, total(c, S), split, splits, place, walk)
            write_part(part, 3, total(d, S), split, splits, place, walk)
            write_part(part, 4, total(e, S), split, splits, place, walk)
        if WEIGHT:
            write_part(part, 5, total(weight_sum, S), split, splits, place, walk)
        if BIAS:
            write_part(part, 6, total(bias_sum, S), split, splits, place, walk)
