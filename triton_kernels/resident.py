"""Kernels that keep a group in registers between the rounds: one read (backward: two) and one
write of device memory. A group is K tiles, held as a tuple of K tensors."""

import triton
import triton.language as tl

from .core import absolute, make_exponents, needs_care
from .joined import activated, read_gradient, stored_sum, with_residual
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
    finish_moments,
    gradient_round,
    group_gradient,
    input_gradient,
    lambda_round,
    transform_round,
)
from .walk import (
    ROWS,
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
def tile_number(i, S: tl.constexpr):
    """What locate_tile() wants for tile i."""
    if S.WALK == ROWS:
        return i
    else:
        return i * S.R


@triton.jit
def row(stats, which, place, walk):
    """Where a row of the statistics tensor holds a program's groups."""
    return stats + tl.cast(walk[0], tl.int64) * which + place[0]


@triton.jit
def moments(x, tiles, inverse_count, eps, S: tl.constexpr):
    """Round 1: (x - mean, mean, mean_low, rstd)."""
    K: tl.constexpr = S.K
    acc = sum_zeros(S)
    for i in tl.static_range(K):
        acc = add(acc, x[i], S)
    mean = total(acc, S) * inverse_count
    sums, squares = sum_zeros(S), sum_zeros(S)
    centred = ()
    for i in tl.static_range(K):
        c = keep(x[i] - mean, tiles[i], S)
        centred = centred + (c,)
        sums = add(sums, c, S)
        squares = add(squares, c * c, S)
    low, rstd = finish_moments(mean, total(sums, S), total(squares, S), inverse_count, eps, S.FAST)
    return centred, mean, low, rstd


@triton.jit
def estimate(centred, tiles, low, rstd, numbers, S: tl.constexpr):
    """Round 2: (signed logarithms, lmbda, A, D, Q)."""
    K: tl.constexpr = S.K
    inverse_count, eps, root_eps, alpha = numbers
    slopes, logs = sum_zeros(S), sum_zeros(S)
    shifts, curvatures = sum_zeros(S), sum_zeros(S)
    signed = ()
    for i in tl.static_range(K):
        h = keep(centred[i] * rstd - low * rstd, tiles[i], S)
        signed_log, slope, shift, curvature = lambda_round(h, S.FAST)
        signed = signed + (signed_log,)
        slopes = add(slopes, slope, S)
        logs = add(logs, signed_log, S)
        shifts = add(shifts, shift, S)
        curvatures = add(curvatures, curvature, S)
    lmbda, slope, shift, q = finish_lambda(
        total(slopes, S), total(logs, S), total(shifts, S), total(curvatures, S),
        rstd, inverse_count, alpha, eps, root_eps, S.ORDER,
    )  # fmt: skip
    return signed, lmbda, slope, shift, q


@triton.jit
def deviation(x, tiles, inverse_count, S: tl.constexpr):
    """Rounds 3 and 4: mean |x - mean(x)|."""
    K: tl.constexpr = S.K
    acc = sum_zeros(S)
    for i in tl.static_range(K):
        acc = add(acc, x[i], S)
    mean = total(acc, S) * inverse_count
    acc = sum_zeros(S)
    for i in tl.static_range(K):
        acc = add(acc, keep(absolute(x[i] - mean), tiles[i], S), S)
    return total(acc, S) * inverse_count


@triton.jit
def forward(
    input,
    output,
    stats,
    weight,
    bias,
    seed,
    noise_scale,
    residual,
    sum,
    walk,
    at_input,
    at_output,
    at_residual,
    at_sum,
    at_noise,
    stream,
    inverse_count: tl.float64,
    eps: tl.float64,
    root_eps: tl.float64,
    alpha: tl.float64,
    transform_eps: tl.float64,
    noise_train: tl.float64,
    S: tl.constexpr,
):
    """The residual is added to the output, or to the input where there is a ``sum`` to be
    written."""
    K: tl.constexpr = S.K
    place = locate_group(tl.program_id(0), walk, S)
    noise = noise_offset(place, at_noise, S)
    at = group_offset(place, at_input, S)
    count = number(inverse_count, S)
    epsilon = number(eps, S)
    tiles = ()
    x = ()
    for i in tl.static_range(K):
        tile = locate_tile(tile_number(i, S), place, walk, noise, at_noise[2], S)
        tiles = tiles + (tile,)
        u = read(input, at, at_input, tile, S)
        if sum is not None:
            stored = stored_sum(u, residual, place, at_residual, tile, S)
            write(sum, group_offset(place, at_sum, S), at_sum, tile, stored, S)
            u = real(stored, S)
        x = x + (u,)
    x, mean, low, rstd = moments(x, tiles, count, epsilon, S)
    numbers = (count, epsilon, number(root_eps, S), number(alpha, S))
    x, lmbda, slope, shift, q = estimate(x, tiles, low, rstd, numbers, S)
    exponents = make_exponents(lmbda, number(transform_eps, S))
    careful = anywhere(needs_care(exponents), S)
    signed = x
    x = ()
    for i in tl.static_range(K):
        x = x + (transform_round(signed[i], exponents, careful, S.FAST),)
    if S.NOISE > 0:
        if noise_scale is None:
            scale = deviation(x, tiles, count, S)
        else:
            scale = tl.load(noise_scale + place[0], mask=place[4], other=0.0)
        factor = number(noise_train, S) * scale
        key = tl.load(seed)
    else:
        scale = 0.0 * rstd
    at = group_offset(place, at_output, S)
    for i in tl.static_range(K):
        y = x[i]
        if S.NOISE > 0:
            y += factor * normals(key, stream, noise, at_noise[2], tiles[i], S)
        w = parameter(weight, 1.0, place, tiles[i], walk, S)
        b = parameter(bias, 0.0, place, tiles[i], walk, S)
        y = y * w + b
        if sum is None:
            y = with_residual(y, residual, place, at_residual, tiles[i], S)
        write(output, at, at_output, tiles[i], activated(y, S), S)
    if stats is not None:
        tl.store(row(stats, MEAN, place, walk), mean, mask=place[4])
        tl.store(row(stats, MEAN_LOW, place, walk), low, mask=place[4])
        tl.store(row(stats, RSTD, place, walk), rstd, mask=place[4])
        tl.store(row(stats, LMBDA, place, walk), lmbda, mask=place[4])
        tl.store(row(stats, NOISE_SCALE, place, walk), scale, mask=place[4])
        tl.store(row(stats, MEAN_HD, place, walk), slope, mask=place[4])
        tl.store(row(stats, MEAN_D, place, walk), shift, mask=place[4])
        tl.store(row(stats, CURVATURE, place, walk), q, mask=place[4])


@triton.jit
def load_constants(stats, place, walk, alpha, transform_eps, S: tl.constexpr):
    """(mean, shift, rstd, noise scale, exponents, gradient constants, careful) of a program's
    groups; h = (u - mean) rstd + shift."""
    mean = tl.load(row(stats, MEAN, place, walk), mask=place[4], other=0.0)
    low = tl.load(row(stats, MEAN_LOW, place, walk), mask=place[4], other=0.0)
    rstd = tl.load(row(stats, RSTD, place, walk), mask=place[4], other=0.0)
    lmbda = tl.load(row(stats, LMBDA, place, walk), mask=place[4], other=1.0)
    scale = tl.load(row(stats, NOISE_SCALE, place, walk), mask=place[4], other=0.0)
    slope = tl.load(row(stats, MEAN_HD, place, walk), mask=place[4], other=0.0)
    shift = tl.load(row(stats, MEAN_D, place, walk), mask=place[4], other=0.0)
    q = tl.load(row(stats, CURVATURE, place, walk), mask=place[4], other=1.0)
    exponents = make_exponents(lmbda, transform_eps)
    gradient = group_gradient(lmbda, slope, shift, q, alpha, S.FROZEN, S.ORDER)
    if S.FROZEN:
        careful = True
    else:
        careful = anywhere(needs_care(exponents), S)
    return mean, -low * rstd, rstd, scale, exponents, gradient, careful


@triton.jit
def backward(
    grad,
    input,
    stats,
    weight,
    seed,
    output,
    weight_part,
    bias_part,
    result,
    grad_sum,
    walk,
    at_grad,
    at_input,
    at_output,
    at_result,
    at_grad_sum,
    at_noise,
    stream,
    blocks,
    inverse_count: tl.float64,
    alpha: tl.float64,
    transform_eps: tl.float64,
    noise_train: tl.float64,
    PARTS: tl.constexpr,
    S: tl.constexpr,
):
    """``PARTS``: 0 no gradients of parameters; 1 a sum a group, in ``*_part[group]``; 2 a sum an
    element of the run over the program's groups, in ``*_part[program, element]``. ``result`` is
    what the forward pass gave, ``output`` the gradient of its input, to which ``grad_sum`` adds."""
    K: tl.constexpr = S.K
    count = number(inverse_count, S)
    weight_sums = ()
    bias_sums = ()
    if PARTS == 2:
        for _ in tl.static_range(K):
            weight_sums = weight_sums + (zeros(S),)
            bias_sums = bias_sums + (zeros(S),)
    if S.NOISE > 0:
        key = tl.load(seed)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = locate_group(block, walk, S)
        noise = noise_offset(place, at_noise, S)
        mean, shift, rstd, scale, exponents, gradient, careful = load_constants(
            stats, place, walk, number(alpha, S), number(transform_eps, S), S
        )
        at = group_offset(place, at_input, S)
        at_g = group_offset(place, at_grad, S)
        held = ()
        tiles = ()
        next_weight = ()
        next_bias = ()
        a, b, c, d, e = sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S)
        bias_sum, weight_sum = sum_zeros(S), sum_zeros(S)
        for i in tl.static_range(K):
            tile = locate_tile(tile_number(i, S), place, walk, noise, at_noise[2], S)
            tiles = tiles + (tile,)
            h = keep((read(input, at, at_input, tile, S) - mean) * rstd + shift, tile, S)
            g = read_gradient(grad, at_g, at_grad, result, place, at_result, tile, S)
            weighted = g * parameter(weight, 1.0, place, tile, walk, S)
            through_h, through_lambda, w, x = gradient_round(
                h, weighted, exponents, gradient, careful, S.FAST
            )
            w = keep(w, tile, S)
            held = held + ((through_h, w, h),)
            a = add(a, through_h, S)
            b = add(b, through_h * h, S)
            c = add(c, through_lambda, S)
            d = add(d, w, S)
            e = add(e, w * h, S)
            if PARTS > 0:
                if weight_part is not None:
                    if S.NOISE > 0:
                        z = normals(key, stream, noise, at_noise[2], tile, S)
                        x += number(noise_train, S) * scale * z
                    if PARTS == 2:
                        next_weight = next_weight + (weight_sums[i] + g * x,)
                    else:
                        weight_sum = add(weight_sum, g * x, S)
                if bias_part is not None:
                    if PARTS == 2:
                        next_bias = next_bias + (bias_sums[i] + g,)
                    else:
                        bias_sum = add(bias_sum, g, S)
        if PARTS == 2:
            if weight_part is not None:
                weight_sums = next_weight
            if bias_part is not None:
                bias_sums = next_bias
        if output is not None:
            sums = (total(a, S), total(b, S), total(c, S), total(d, S), total(e, S))
            finished = finish_gradient(sums, count, rstd, S.FROZEN)
            at_o = group_offset(place, at_output, S)
            for i in tl.static_range(K):
                through_h, w, h = held[i]
                du = input_gradient(through_h, w, h, rstd, finished)
                du = with_residual(du, grad_sum, place, at_grad_sum, tiles[i], S)
                write(output, at_o, at_output, tiles[i], du, S)
        if PARTS == 1:
            if weight_part is not None:
                tl.store(weight_part + place[0], total(weight_sum, S), mask=place[4])
            if bias_part is not None:
                tl.store(bias_part + place[0], total(bias_sum, S), mask=place[4])
    if PARTS == 2:
        for i in tl.static_range(K):
            column = i * S.L + tl.arange(0, S.L)
            at_part = tl.cast(tl.program_id(0), tl.int64) * walk[3] + column
            if weight_part is not None:
                tl.store(weight_part + at_part, tl.sum(weight_sums[i], 0), mask=column < walk[3])
            if bias_part is not None:
                tl.store(bias_part + at_part, tl.sum(bias_sums[i], 0), mask=column < walk[3])
