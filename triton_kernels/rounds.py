"""The five rounds of the forward pass and the two of the backward pass, for the elements of a tile
and for a group's totals, as in ``csrc/cuda/rounds.cuh``. Every kernel is made of these.

A group's numbers are scalars, or columns or rows of one number a group (``walk.py``): whatever
broadcasts against the tile.
"""

import triton
import triton.language as tl

from .core import (
    absolute,
    device_side,
    fast_reciprocal,
    fast_rsqrt,
    lambda_gradient,
    lambda_terms_but_squares,
    lambda_weight,
    log_of,
    natural,
    newton_step,
    psi,
    psi_slopes,
    signed_as,
)

# Rows of the statistics tensor (normnorm/statistics.py).
MEAN = tl.constexpr(0)
MEAN_LOW = tl.constexpr(1)
RSTD = tl.constexpr(2)
LMBDA = tl.constexpr(3)
NOISE_SCALE = tl.constexpr(4)
MEAN_HD = tl.constexpr(5)
MEAN_D = tl.constexpr(6)
CURVATURE = tl.constexpr(7)


@triton.jit
def finish_moments(mean, total, squares, inverse_count, eps, FAST: tl.constexpr):
    """(mean_low, rstd) from the sums of c and c^2 around the rounded mean."""
    low = total * inverse_count
    variance = squares * inverse_count - low * low
    return low, rstd_of(variance, eps, FAST)


@triton.jit
def rstd_of(variance, eps, FAST: tl.constexpr):
    """NaN of an infinite variance, whose root's reciprocal would make zeros of the group."""
    # no maximum: a NaN group must stay NaN
    rstd = fast_rsqrt(tl.where(variance < 0, 0.0, variance) + eps, FAST)
    return rstd + (variance - variance)


@triton.jit
def lambda_round(h, FAST: tl.constexpr):
    """An element's terms of the lambda estimate, and the logarithm of 1 + |h|, signed as h."""
    t = absolute(h)
    log = log_of(t, FAST)
    signed_log = signed_as(log, h)
    slope, shift, curvature = lambda_terms_but_squares(h, t, natural(log))
    return signed_log, slope, shift, curvature


@triton.jit
def finish_lambda(
    slope,
    signed_log,
    shift,
    curvature,
    rstd,
    inverse_count,
    alpha,
    eps,
    root_eps,
    ORDER: tl.constexpr,
):
    """(lmbda, A, D, Q) from the sums. The squares that round 2 leaves out have the mean
    v r^2 = 1 - eps r^2."""
    slope = slope * inverse_count
    shift = shift * inverse_count
    curvature = curvature * inverse_count + 3.0 * (1.0 - eps * rstd * rstd)
    log = natural(signed_log) * inverse_count
    lmbda, q = newton_step(slope, log, shift, curvature, alpha, root_eps, ORDER)
    return lmbda, slope, shift, q


@triton.jit
def transform_side(signed_log, exponents, CAREFUL: tl.constexpr, FAST: tl.constexpr):
    eta, inverse, _ = device_side(signed_log, exponents, CAREFUL)
    _, magnitude = psi(absolute(signed_log), eta, inverse, CAREFUL, FAST)
    return signed_as(magnitude, signed_log)


@triton.jit
def transform_round(signed_log, exponents, careful, FAST: tl.constexpr):
    """x from round 2's signed logarithm; whether to take care is known only at run time."""
    if careful:
        x = transform_side(signed_log, exponents, True, FAST)
    else:
        x = transform_side(signed_log, exponents, False, FAST)
    return x


@triton.jit
def gradient_side(h, weighted, exponents, gradient, CAREFUL: tl.constexpr, FAST: tl.constexpr):
    t = absolute(h)
    log = log_of(t, FAST)
    l = natural(log)
    eta, inverse, active = device_side(h, exponents, CAREFUL)
    power, magnitude = psi(log, eta, inverse, CAREFUL, FAST)
    reciprocal = fast_reciprocal(t + 1.0, FAST)
    psi_h, psi_lambda = psi_slopes(l, reciprocal, power, magnitude, eta, inverse, active, CAREFUL)
    w = lambda_weight(h, t, l, reciprocal, gradient)
    return weighted * psi_h, weighted * psi_lambda, w, signed_as(magnitude, h)


@triton.jit
def gradient_round(h, weighted, exponents, gradient, careful, FAST: tl.constexpr):
    """(G psi_h, G psi_lmbda, w, x) of elements, G being the gradient times the weight."""
    if careful:
        through_h, through_lambda, w, x = gradient_side(
            h, weighted, exponents, gradient, True, FAST
        )
    else:
        through_h, through_lambda, w, x = gradient_side(
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
def group_gradient(
    lmbda, slope, shift, curvature, alpha, FROZEN: tl.constexpr, ORDER: tl.constexpr
):
    """The constants of w; a frozen lambda has no gradient."""
    if FROZEN:
        none = 0.0 * lmbda
        return none, none, none, none
    else:
        return lambda_gradient(lmbda, slope, shift, curvature, alpha, ORDER)
