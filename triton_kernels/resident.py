"""Kernels that keep a group in registers between the rounds: one read (backward: two) and one
write of device memory. A group is K tiles, held as a tuple of K tensors."""

import triton
import triton.language as tl

from .epilogue import activated, read_gradient, stored_sum, with_residual
from .layout import (
    Tile,
    any_group,
    keep,
    locate_group,
    locate_tile,
    normals,
    parameter,
    read,
    real,
    write,
    zeros,
)
from .math import absolute, make_exponents, needs_series
from .params import ROWS, numbers
from .reduce import add, load_moments, stat, sum_zeros, total
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


@triton.jit
def tile_number(i, S: tl.constexpr):
    """The argument of locate_tile() for tile i."""
    if S.LAYOUT == ROWS:
        return i
    else:
        return i * S.R


@triton.jit
def tile_at(tiles, i: tl.constexpr):
    """tiles[i] with the names of its fields, which Triton 3.6 loses for a tuple in a tuple."""
    t = tiles[i]
    return Tile(t[0], t[1], t[2], t[3], t[4])


@triton.jit
def moments(x, tiles, n, S: tl.constexpr):
    """Round 1: (x - mean, mean, mean_low, rstd)."""
    K: tl.constexpr = S.K
    acc = sum_zeros(S)
    for i in tl.static_range(K):
        acc = add(acc, x[i], S)
    mean = total(acc, S) * n.inverse_count
    sums, squares = sum_zeros(S), sum_zeros(S)
    centred = ()
    for i in tl.static_range(K):
        c = keep(x[i] - mean, tile_at(tiles, i), S)
        centred = centred + (c,)
        sums = add(sums, c, S)
        squares = add(squares, c * c, S)
    low, rstd = finish_moments(total(sums, S), total(squares, S), n.inverse_count, n.eps, S.FAST)
    return centred, mean, low, rstd


@triton.jit
def estimate(centred, tiles, low, rstd, n, S: tl.constexpr):
    """Round 2: (signed logarithms, lmbda, A, D, Q)."""
    K: tl.constexpr = S.K
    hds, logs = sum_zeros(S), sum_zeros(S)
    ds, es = sum_zeros(S), sum_zeros(S)
    signed = ()
    for i in tl.static_range(K):
        h = keep(centred[i] * rstd - low * rstd, tile_at(tiles, i), S)
        signed_log, hd, d, e = lambda_round(h, S.FAST)
        signed = signed + (signed_log,)
        hds = add(hds, hd, S)
        logs = add(logs, signed_log, S)
        ds = add(ds, d, S)
        es = add(es, e, S)
    hd, log, d, e = total(hds, S), total(logs, S), total(ds, S), total(es, S)
    lmbda, mean_hd, mean_d, q = finish_lambda((log, hd, d, e), rstd, n, S.ORDER)
    return signed, lmbda, mean_hd, mean_d, q


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
        acc = add(acc, keep(absolute(x[i] - mean), tile_at(tiles, i), S), S)
    return total(acc, S) * inverse_count


@triton.jit
def store_statistics(stats, values, place, geometry):
    mean, low, rstd, lmbda, mean_hd, mean_d, q = values
    tl.store(stat(stats, MEAN, place, geometry), mean, mask=place.present)
    tl.store(stat(stats, MEAN_LOW, place, geometry), low, mask=place.present)
    tl.store(stat(stats, RSTD, place, geometry), rstd, mask=place.present)
    tl.store(stat(stats, LMBDA, place, geometry), lmbda, mask=place.present)
    tl.store(stat(stats, MEAN_HD, place, geometry), mean_hd, mask=place.present)
    tl.store(stat(stats, MEAN_D, place, geometry), mean_d, mask=place.present)
    tl.store(stat(stats, CURVATURE, place, geometry), q, mask=place.present)


@triton.jit
def forward(
    tensors, stats, affine, noise, geometry,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    S: tl.constexpr,
):  # fmt: skip
    """The whole forward pass of a group."""
    K: tl.constexpr = S.K
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    place = locate_group(tl.program_id(0), geometry, S)
    tiles = ()
    x = ()
    for i in tl.static_range(K):
        tile = locate_tile(tile_number(i, S), place, geometry, S)
        tiles = tiles + (tile,)
        u = read(tensors.input, place, tile, S)
        if tensors.sum.data is not None:
            stored = stored_sum(u, tensors.residual, place, tile, S)
            write(tensors.sum, place, tile, stored, S)
            u = real(stored, S)
        x = x + (u,)
    x, mean, low, rstd = moments(x, tiles, n, S)
    signed, lmbda, mean_hd, mean_d, q = estimate(x, tiles, low, rstd, n, S)
    values = (mean, low, rstd, lmbda, mean_hd, mean_d, q)
    # Stored early, the statistics leave their registers to the output. A short row has only one
    # tile: there a later store spills less.
    early: tl.constexpr = S.LAYOUT != ROWS or (tensors.sum.data is not None and K > 1)
    if stats is not None and early:
        store_statistics(stats, values, place, geometry)
    exponents = make_exponents(lmbda, n.transform_eps)
    series = any_group(needs_series(exponents), S)
    x = ()
    for i in tl.static_range(K):
        x = x + (transform_round(signed[i], exponents, series, S.FAST),)
    if S.NOISE > 0:
        if noise.scale is None:
            scale = deviation(x, tiles, n.inverse_count, S)
        else:
            scale = tl.load(noise.scale + place.group, mask=place.present, other=0.0)
        factor = n.noise_train * scale
        key = tl.load(noise.seed)
    else:
        scale = 0.0 * rstd
    if stats is not None and early:
        tl.store(stat(stats, NOISE_SCALE, place, geometry), scale, mask=place.present)
    for i in tl.static_range(K):
        y = x[i]
        tile = tile_at(tiles, i)
        if S.NOISE > 0:
            y += factor * normals(key, noise.stream, place, tile, geometry.noise_run, S)
        w = parameter(affine.weight, 1.0, place, tile, geometry, S)
        b = parameter(affine.bias, 0.0, place, tile, geometry, S)
        y = y * w + b
        if tensors.sum.data is None:
            y = with_residual(y, tensors.residual, place, tile, S)
        write(tensors.output, place, tile, activated(y, S), S)
    if stats is not None and not early:
        store_statistics(stats, values, place, geometry)
        tl.store(stat(stats, NOISE_SCALE, place, geometry), scale, mask=place.present)


@triton.jit
def load_constants(stats, place, geometry, n, S: tl.constexpr):
    """(mean, offset, rstd, noise scale, exponents, gradient constants, series) of a program's
    groups; h = (u - mean) rstd + offset."""
    mean, low, rstd = load_moments(stats, place, geometry)
    lmbda = tl.load(stat(stats, LMBDA, place, geometry), mask=place.present, other=1.0)
    scale = tl.load(stat(stats, NOISE_SCALE, place, geometry), mask=place.present, other=0.0)
    mean_hd = tl.load(stat(stats, MEAN_HD, place, geometry), mask=place.present, other=0.0)
    mean_d = tl.load(stat(stats, MEAN_D, place, geometry), mask=place.present, other=0.0)
    q = tl.load(stat(stats, CURVATURE, place, geometry), mask=place.present, other=1.0)
    exponents = make_exponents(lmbda, n.transform_eps)
    gradient = group_gradient(lmbda, mean_hd, mean_d, q, n, S)
    if S.FROZEN:
        series = True
    else:
        series = any_group(needs_series(exponents), S)
    return mean, -low * rstd, rstd, scale, exponents, gradient, series


@triton.jit
def backward(
    tensors, stats, weight, noise, parts, geometry, blocks,
    inverse_count: tl.float64, eps: tl.float64, root_eps: tl.float64, alpha: tl.float64,
    transform_eps: tl.float64, noise_train: tl.float64,
    PARTS: tl.constexpr, S: tl.constexpr,
):  # fmt: skip
    """The whole backward pass of the groups of ``blocks`` blocks, which the programs share.

    Gradients of weight and bias, where ``parts`` has room for them, are with ``PARTS`` 1 a sum a
    group, ``[group]``, and with 2 a sum an element of the run over the program's groups,
    ``[program, element]``.
    """
    K: tl.constexpr = S.K
    n = numbers(inverse_count, eps, root_eps, alpha, transform_eps, noise_train, S)
    weight_sums = ()
    bias_sums = ()
    if PARTS == 2:
        for _ in tl.static_range(K):
            weight_sums = weight_sums + (zeros(S),)
            bias_sums = bias_sums + (zeros(S),)
    if S.NOISE > 0:
        key = tl.load(noise.seed)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        place = locate_group(block, geometry, S)
        mean, offset, rstd, scale, exponents, gradient, series = load_constants(
            stats, place, geometry, n, S
        )
        held = ()
        tiles = ()
        next_weight = ()
        next_bias = ()
        a, b, c, d, e = sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S), sum_zeros(S)
        bias_sum, weight_sum = sum_zeros(S), sum_zeros(S)
        for i in tl.static_range(K):
            tile = locate_tile(tile_number(i, S), place, geometry, S)
            tiles = tiles + (tile,)
            h = keep((read(tensors.input, place, tile, S) - mean) * rstd + offset, tile, S)
            g = read_gradient(tensors.grad, tensors.result, place, tile, S)
            weighted = g * parameter(weight, 1.0, place, tile, geometry, S)
            through_h, through_lambda, w, x = gradient_round(
                h, weighted, exponents, gradient, series, S.FAST
            )
            w = keep(w, tile, S)
            held = held + ((through_h, w, h),)
            a = add(a, through_h, S)
            b = add(b, through_h * h, S)
            c = add(c, through_lambda, S)
            d = add(d, w, S)
            e = add(e, w * h, S)
            if PARTS > 0:
                if parts.weight is not None:
                    if S.NOISE > 0:
                        z = normals(key, noise.stream, place, tile, geometry.noise_run, S)
                        x += n.noise_train * scale * z
                    if PARTS == 2:
                        next_weight = next_weight + (weight_sums[i] + g * x,)
                    else:
                        weight_sum = add(weight_sum, g * x, S)
                if parts.bias is not None:
                    if PARTS == 2:
                        next_bias = next_bias + (bias_sums[i] + g,)
                    else:
                        bias_sum = add(bias_sum, g, S)
        if PARTS == 2:
            if parts.weight is not None:
                weight_sums = next_weight
            if parts.bias is not None:
                bias_sums = next_bias
        if tensors.output.data is not None:
            sums = (total(a, S), total(b, S), total(c, S), total(d, S), total(e, S))
            finished = finish_gradient(sums, n.inverse_count, rstd, S.FROZEN)
            for i in tl.static_range(K):
                through_h, w, h = held[i]
                tile = tile_at(tiles, i)
                du = input_gradient(through_h, w, h, rstd, finished)
                du = with_residual(du, tensors.grad_sum, place, tile, S)
                write(tensors.output, place, tile, du, S)
        if PARTS == 1:
            if parts.weight is not None:
                tl.store(parts.weight + place.group, total(weight_sum, S), mask=place.present)
            if parts.bias is not None:
                tl.store(parts.bias + place.group, total(bias_sum, S), mask=place.present)
    if PARTS == 2:
        length = geometry.length
        for i in tl.static_range(K):
            column = i * S.L + tl.arange(0, S.L)
            at = tl.cast(tl.program_id(0), tl.int64) * length + column
            if parts.weight is not None:
                tl.store(parts.weight + at, tl.sum(weight_sums[i], 0), mask=column < length)
            if parts.bias is not None:
                tl.store(parts.bias + at, tl.sum(bias_sums[i], 0), mask=column < length)
