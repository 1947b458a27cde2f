"""The mathematics of one element and of one group, as in ``csrc/math`` and under its names.

With t = |h|, l = log(1+t), eta = 1 + sign(h) (lmbda - 1) and P = (1+t)^eta:
``|psi| = (P-1)/eta``, ``dpsi/dh = P/(1+t)``, ``dpsi/dlmbda = (P l - |psi|)/eta``.

Two compile-time constants select the code:

* ``FAST``: logarithm, power, reciprocal and root are one special-function instruction of an NVIDIA
  GPU each, as in ``device_math.h``. Without it (AMD, the interpreter) and in float64 they are
  Triton's functions.
* ``SERIES``: the precision path. A series replaces P - 1 where it would cancel, and exponents are
  clamped. Groups with a small or a large exponent take it, and those whose lambda is given, so
  that h is unbounded.
"""

from typing import NamedTuple

import triton
import triton.language as tl

# Up to TINY_ETA, (exp(eta l) - 1)/eta is l to rounding. Beyond MAX_EXPONENT, exp() times a weight
# may overflow.
TINY_ETA_FLOAT = tl.constexpr(1e-12)
TINY_ETA_DOUBLE = tl.constexpr(1e-20)
MAX_EXPONENT_FLOAT = tl.constexpr(80.0)
MAX_EXPONENT_DOUBLE = tl.constexpr(700.0)
LN_2 = tl.constexpr(0.6931471805599453)
LOG2_E = tl.constexpr(1.4426950408889634)


class Exponents(NamedTuple):
    """The exponents of a group for positive and negative h, their reciprocals, and whether psi has
    a derivative in lmbda there (1 or 0)."""

    eta_pos: tl.tensor
    eta_neg: tl.tensor
    inverse_pos: tl.tensor
    inverse_neg: tl.tensor
    active_pos: tl.tensor
    active_neg: tl.tensor


class LambdaGradient(NamedTuple):
    """The constants of n dlmbda/dh_i = w(h_i) of a group."""

    even: tl.tensor
    reciprocal: tl.tensor
    odd: tl.tensor
    two_d: tl.tensor  # 2 + 2 D


@triton.jit
def special(x, INSTRUCTION: tl.constexpr):
    return tl.inline_asm_elementwise(
        INSTRUCTION, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def fast_log2(x, FAST: tl.constexpr):
    if FAST:
        return special(x, "lg2.approx.ftz.f32 $0, $1;")
    else:
        return tl.log2(x)


@triton.jit
def fast_exp2(x, FAST: tl.constexpr):
    if FAST:
        return special(x, "ex2.approx.ftz.f32 $0, $1;")
    else:
        return tl.exp2(x)


@triton.jit
def fast_reciprocal(x, FAST: tl.constexpr):
    if FAST and x.dtype == tl.float32:
        return special(x, "rcp.approx.ftz.f32 $0, $1;")
    else:
        return 1.0 / x


@triton.jit
def fast_sqrt(x, FAST: tl.constexpr):
    if FAST:
        return special(x, "sqrt.approx.ftz.f32 $0, $1;")
    else:
        return tl.sqrt(x)


@triton.jit
def fast_rsqrt(x, FAST: tl.constexpr):
    if FAST and x.dtype == tl.float32:
        return special(x, "rsqrt.approx.ftz.f32 $0, $1;")
    else:
        return 1.0 / tl.sqrt(x)


@triton.jit
def absolute(x):
    return tl.abs(x)


@triton.jit
def signed_as(magnitude, sign):
    """``magnitude`` (>= 0) with the sign of ``sign``."""
    if magnitude.dtype == tl.float64:
        return tl.where(sign < 0, -magnitude, magnitude)
    else:
        bits = sign.to(tl.uint32, bitcast=True) & 0x80000000
        return (magnitude.to(tl.uint32, bitcast=True) | bits).to(tl.float32, bitcast=True)


# Logarithms are kept in the base of the power function: 2 for float32, e for float64.


@triton.jit
def log_of(t, FAST: tl.constexpr):
    """log(1 + t), t >= 0."""
    if t.dtype == tl.float64:
        u = 1.0 + t  # the quotient cancels the rounding of this sum
        return tl.where(u == 1.0, t, tl.log(u) * (t / tl.where(u == 1.0, 1.0, u - 1.0)))
    else:
        return fast_log2(1.0 + t, FAST)


@triton.jit
def natural(log):
    if log.dtype == tl.float64:
        return log
    else:
        return log * LN_2


@triton.jit
def first_exponential(a):
    """(e^a - 1)/a for |a| < 1/2."""
    if a.dtype == tl.float64:
        s = 1.0 + a * (1.0 / 18.0)
        for i in tl.static_range(16):
            s = 1.0 + s * a * (1.0 / (17 - i))
        return s
    else:
        p = a * 1.9841270e-04 + 1.3888889e-03
        p = p * a + 8.3333333e-03
        p = p * a + 4.1666667e-02
        p = p * a + 1.6666667e-01
        p = p * a + 0.5
        return p * a + 1.0


@triton.jit
def second_exponential(a):
    """(a e^a - e^a + 1)/a^2 for |a| < 1/2; dpsi/dlmbda is l^2 times this."""
    if a.dtype == tl.float64:
        s = 1.0 + a * (18.0 / (17 * 19))
        for i in tl.static_range(16):
            s = 1.0 + s * a * ((17 - i) / ((16 - i) * (18 - i)))
        return s * 0.5
    else:
        p = a * 1.731696539e-04 + 1.200088067e-03
        p = p * a + 6.944879889e-03
        p = p * a + 3.333214298e-02
        p = p * a + 1.249999478e-01
        p = p * a + 3.333333731e-01
        return p * a + 0.5


@triton.jit
def max_exponent(a):
    if a.dtype == tl.float64:
        return MAX_EXPONENT_DOUBLE
    else:
        return MAX_EXPONENT_FLOAT


@triton.jit
def clamp_exponent(a):
    return tl.where(a > max_exponent(a), max_exponent(a), a)  # a NaN stays NaN


@triton.jit
def make_side(eta, transform_eps):
    """(eta, 1/eta, active) of one sign of h. With ``transform_eps``, |eta| grows by it, except that
    psi is log(1+t), without a derivative in lmbda (active 0), where |eta| <= transform_eps."""
    linear = tl.abs(eta) <= tl.where(transform_eps > 0, transform_eps, -1.0)
    eta = tl.where(linear, 0.0, eta + tl.where(eta < 0, -transform_eps, transform_eps))
    # The limit at eta = 0 is psi = log(1+t); a tiny exponent gives it to rounding without a branch.
    if eta.dtype == tl.float64:
        eta = tl.where(tl.abs(eta) < TINY_ETA_DOUBLE, TINY_ETA_DOUBLE, eta)
    else:
        eta = tl.where(tl.abs(eta) < TINY_ETA_FLOAT, TINY_ETA_FLOAT, eta)
    one = tl.full([], 1.0, eta.dtype)
    return eta, one / eta, tl.where(linear, 0.0, one)


@triton.jit
def make_exponents(lmbda, transform_eps):
    eta_pos, inverse_pos, active_pos = make_side(lmbda, transform_eps)
    eta_neg, inverse_neg, active_neg = make_side(2.0 - lmbda, transform_eps)
    return Exponents(eta_pos, eta_neg, inverse_pos, inverse_neg, active_pos, active_neg)


@triton.jit
def needs_series(e):
    """Whether a group with these exponents takes the SERIES path. With both at least a quarter
    P - 1 loses less than 4 ulp of l; up to 7 no power of a standardized h, below 46341 in a group
    of 2^31, exceeds MAX_EXPONENT. True wherever an exponent is not active."""
    plain = (tl.abs(e.eta_pos) >= 0.25) & (tl.abs(e.eta_neg) >= 0.25)
    plain = plain & (e.eta_pos <= 7.0) & (e.eta_neg <= 7.0)
    return (plain & (e.active_pos > 0) & (e.active_neg > 0)) == 0


@triton.jit
def signed_exponent(h, e, SERIES: tl.constexpr):
    """(eta, 1/eta, active) for the sign of each h; ``active`` is defined with SERIES only."""
    negative = h < 0
    eta = tl.where(negative, e.eta_neg, e.eta_pos)
    inverse = tl.where(negative, e.inverse_neg, e.inverse_pos)
    active = eta
    if SERIES:
        active = tl.where(negative, e.active_neg, e.active_pos)
    return eta, inverse, active


@triton.jit
def psi(log, eta, inverse, SERIES: tl.constexpr, FAST: tl.constexpr):
    """(P, |psi|) from the logarithm of 1 + |h|."""
    if log.dtype == tl.float64:
        a = clamp_exponent(eta * log)
        power = tl.exp(a)
        near = tl.abs(a) < 0.5
        magnitude = tl.where(near, a * first_exponential(a), power - 1.0) * inverse
    elif SERIES:
        a = clamp_exponent(eta * natural(log))
        power = fast_exp2(a * LOG2_E, FAST)
        near = tl.abs(a) < 0.5
        magnitude = tl.where(near, a * first_exponential(a), power - 1.0) * inverse
    else:
        power = fast_exp2(eta * log, FAST)
        magnitude = (power - 1.0) * inverse
    return power, magnitude


@triton.jit
def psi_slopes(l, reciprocal, power, magnitude, exponent, SERIES: tl.constexpr):
    """(dpsi/dh, dpsi/dlmbda), both 0 where the exponent was clamped."""
    eta, inverse, active = exponent
    psi_h = power * reciprocal
    psi_lambda = (power * l - magnitude) * inverse
    if SERIES:
        a = eta * l
        saturated = a > max_exponent(a)
        psi_lambda = tl.where(tl.abs(a) < 0.5, l * l * second_exponential(a), psi_lambda)
        psi_lambda = tl.where(saturated, 0.0, psi_lambda) * active
        psi_h = tl.where(saturated, 0.0, psi_h)
    return psi_h, psi_lambda


@triton.jit
def lambda_terms(h, t, l):
    """(h d, d, e - 3 t^2) with q = (1+t) l, d = q - t, e = q (q + t (l-4)) + 3 t^2: the terms of
    the lambda estimate besides sign(h) l. The mean of t^2 follows from the variance."""
    q = t * l + l
    d = q - t
    return h * d, d, q * (t * (l - 4.0) + q)


@triton.jit
def newton_step(mean_hd, mean_log, mean_d, mean_e, n, ORDER: tl.constexpr):
    """(lmbda, Q) from the means of the terms; ``n``: Numbers."""
    variance = mean_e - mean_d * mean_d - 2.0 * mean_hd * mean_hd
    q = tl.where(variance < 0, 0.0, variance) + n.root_eps  # not maximum(): a NaN must stay NaN
    first = mean_hd - mean_log
    if ORDER == 1:
        return 1.0 - n.alpha * first, q
    else:
        return 1.0 - n.alpha * (first / q), q


@triton.jit
def lambda_gradient(lmbda, mean_hd, mean_d, q, n, ORDER: tl.constexpr):
    two_d = 2.0 + 2.0 * mean_d
    if ORDER == 1:
        c_r = n.alpha + 0.0 * mean_d
        return LambdaGradient(-c_r, c_r, 0.0 * c_r, two_d)
    else:
        kap = (lmbda - 1.0) / tl.where(n.alpha == 0, 1.0, n.alpha)
        c_r = n.alpha / q
        return LambdaGradient(-c_r * (1.0 - 4.0 * mean_hd * kap), c_r, -c_r * kap, two_d)


@triton.jit
def lambda_weight(h, t, l, reciprocal, c):
    """w(h), the derivative of n lmbda in one element."""
    four_t = t * 4.0
    even = (t * 2.0 + 1.0) * l - t
    odd = ((four_t + 3.0) * l - (four_t + c.two_d)) * l + t * 2.0
    return c.even * even + (c.reciprocal * reciprocal + c.odd * tl.where(h < 0, -odd, odd))
