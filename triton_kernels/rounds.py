"""The five rounds of the forward pass and the two of the backward pass, for the elements of a tile
and for the sums of a group, as in ``csrc/cuda/math.cuh``. Every kernel consists of these.

The numbers of a group have any shape that broadcasts against the tile (``layout.py``).
"""

import triton
import triton.language as tl

from ..statistics import Row
from .math import (
    LambdaGradient,
    absolute,
    fast_reciprocal,
    fast_rsqrt,
    lambda_gradient,
    lambda_terms,
    lambda_weight,
    log_of,
    natural,
    newton_step,
    psi,
    psi_slopes,
    signed_as,
    signed_exponent,
)

# Rows of the statistics tensor.
MEAN = tl.constexpr(Row.MEAN.value)
MEAN_LOW = tl.constexpr(Row.MEAN_LOW.value)
RSTD = tl.constexpr(Row.RSTD.value)
LMBDA = tl.constexpr(Row.LMBDA.value)
NOISE_SCALE = tl.constexpr(Row.NOISE_SCALE.value)
MEAN_HD = tl.constexpr(Row.MEAN_HD.value)
MEAN_D = tl.constexpr(Row.MEAN_D.value)
CURVATURE = tl.constexpr(Row.CURVATURE.value)


@triton.jit
def finish_moments(total, squares, inverse_count, eps, FAST: tl.constexpr):
    """(mean_low, rstd) from the sums of c and c^2 around the rounded mean."""
    low = total * inverse_count
    variance = squares * inverse_count - low * low
    return low, rstd_of(variance, eps, FAST)


@triton.jit
def rstd_of(variance, eps, FAST: tl.constexpr):
    """(variance + eps)^-1/2; NaN, not 0, for an infinite variance."""
    # not maximum(): a NaN must stay NaN
    rstd = fast_rsqrt(tl.where(variance < 0, 0.0, variance) + eps, FAST)
    return rstd + (variance - variance)


@triton.jit
def lambda_round(h, FAST: tl.constexpr):
    """(log(1+|h|) with the sign of h, and the terms h d, d, e - 3 t^2 of the lambda estimate)."""
    t = absolute(h)
    log = log_of(t, FAST)
    signed_log = signed_as(log, h)
    hd, d, e = lambda_terms(h, t, natural(log))
    return signed_log, hd, d, e


@triton.jit
def finish_lambda(sums, rstd, n, ORDER: tl.constexpr):
    """(lmbda, A, D, Q) from the sums of lambda_round(). The mean of the squares that it leaves out
    is v r^2 = 1 - eps r^2."""
    signed_log, hd, d, e = sums
    mean_hd = hd * n.inverse_count
    mean_d = d * n.inverse_count
    mean_e = e * n.inverse_count + 3.0 * (1.0 - n.eps * rstd * rstd)
    log = natural(signed_log) * n.inverse_count
    lmbda, q = newton_step(mean_hd, log, mean_d, mean_e, n, ORDER)
    return lmbda, mean_hd, mean_d, q


@triton.jit
def transform_on_path(signed_log, exponents, SERIES: tl.constexpr, FAST: tl.constexpr):
    eta, inverse, _ = signed_exponent(signed_log, exponents, SERIES)
    _, magnitude = psi(absolute(signed_log), eta, inverse, SERIES, FAST)
    return signed_as(magnitude, signed_log)


@triton.jit
def transform_round(signed_log, exponents, series, FAST: tl.constexpr):
    """x from the signed logarithm of round 2; ``series`` selects the precision path at run time."""
    if series:
        x = transform_on_path(signed_log, exponents, True, FAST)
    else:
        x = transform_on_path(signed_log, exponents, False, FAST)
    return x


@triton.jit
def gradient_on_path(h, weighted, exponents, gradient, SERIES: tl.constexpr, FAST: tl.constexpr):
    t = absolute(h)
    log = log_of(t, FAST)
    l = natural(log)
    exponent = signed_exponent(h, exponents, SERIES)
    power, magnitude = psi(log, exponent[0], exponent[1], SERIES, FAST)
    reciprocal = fast_reciprocal(t + 1.0, FAST)
    psi_h, psi_lambda = psi_slopes(l, reciprocal, power, magnitude, exponent, SERIES)
    w = lambda_weight(h, t, l, reciprocal, gradient)
    return weighted * psi_h, weighted * psi_lambda, w, signed_as(magnitude, h)


@triton.jit
def gradient_round(h, weighted, exponents, gradient, series, FAST: tl.constexpr):
    """(G psi_h, G psi_lmbda, w, x) of elements, G being the gradient times the weight."""
    if series:
        through_h, through_lambda, w, x = gradient_on_path(
            h, weighted, exponents, gradient, True, FAST
        )
    else:
        through_h, through_lambda, w, x = gradient_on_path(
            h, weighted, exponents, gradient, False, FAST
        )
    return through_h, through_lambda, w, x


@triton.jit
def finish_gradient(sums, inverse_count, rstd, FROZEN: tl.constexpr):
    """(lmbda, offset, slope) of du = rstd G psi_h + lmbda w + (slope h + offset), from the sums of
    G psi_h, G psi_h h, G psi_lmbda, w and w h."""
    if FROZEN:
        none = 0.0 * rstd
        return none, none, none
    else:
        through_h, through_h_h, through_lambda, w, w_h = sums
        lmbda = through_lambda * inverse_count
        offset = -rstd * (through_h * inverse_count + lmbda * (w * inverse_count))
        slope = -rstd * (through_h_h * inverse_count + lmbda * (w_h * inverse_count))
        return rstd * lmbda, offset, slope


@triton.jit
def input_gradient(through_h, w, h, rstd, gradient):
    lmbda, offset, slope = gradient
    return rstd * through_h + (lmbda * w + (slope * h + offset))


@triton.jit
def group_gradient(lmbda, mean_hd, mean_d, q, n, S: tl.constexpr):
    """The constants of w; zeros where lambda is given, as it then has no gradient."""
    if S.FROZEN:
        none = 0.0 * lmbda
        return LambdaGradient(none, none, none, none)
    else:
        return lambda_gradient(lmbda, mean_hd, mean_d, q, n, S.ORDER)
