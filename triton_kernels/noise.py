"""The noise: Philox4x32-10 and Box-Muller, bit for bit the words of ``normnorm/noise.py``.

Four elements share a counter. ``tl.randn`` takes one normal of a counter's four words, and its
cosine has a slow path for large angles that costs a stack frame.
"""

import triton
import triton.language as tl

from .math import fast_log2, fast_sqrt, special

PHILOX_ROUNDS = tl.constexpr(10)


@triton.jit
def philox_rounds(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words; the same words as ``tl.philox``. One 64-bit multiplication gives
    both halves of a product, where ``tl.philox`` multiplies twice."""
    for _ in tl.static_range(PHILOX_ROUNDS):
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = tl.add(k0, 0x9E3779B9, sanitize_overflow=False)
        k1 = tl.add(k1, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3


@triton.jit
def noise_words(seed, stream, quad):
    """The four words of elements 4 quad .. 4 quad + 3; ``quad`` is int32 or int64."""
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    if quad.dtype == tl.int64:
        c0, c1 = quad.to(tl.uint32), (quad >> 32).to(tl.uint32)
    else:
        c0, c1 = quad.to(tl.uint32, bitcast=True), zero
    return philox_rounds(c0, c1, tl.cast(stream, tl.uint32), zero, k0, k1)


@triton.jit
def sincos_turn(word):
    """(sin, cos) of 2 pi (w + 1/2) / 2^32. The reduction to an octant is exact in integers."""
    turned = tl.add(word, 0x20000000, sanitize_overflow=False)
    rest = tl.sub(word, turned & 0xC0000000, sanitize_overflow=False).to(tl.int32, bitcast=True)
    x = (rest.to(tl.float32) + 0.5) * 1.46291807926715968e-09
    x2 = x * x
    s = ((x2 * -1.951729791e-04 + 8.332177997e-03) * x2 - 1.666665524e-01) * (x2 * x) + x
    c = (x2 * 2.443845005e-05 - 1.388736768e-03) * x2 + 4.166664556e-02
    c = c * (x2 * x2) + (1.0 - x2 * 0.5)
    odd = (turned & 0x40000000) != 0
    # sine is negative in quadrants 2 and 3, cosine in 1 and 2
    sin_sign = turned & 0x80000000
    cos_sign = tl.add(turned, 0x40000000, sanitize_overflow=False) & 0x80000000
    sin = tl.where(odd, c, s).to(tl.uint32, bitcast=True) ^ sin_sign
    cos = tl.where(odd, s, c).to(tl.uint32, bitcast=True) ^ cos_sign
    return sin.to(tl.float32, bitcast=True), cos.to(tl.float32, bitcast=True)


@triton.jit
def fast_box_muller(radius_word, angle_word, FAST: tl.constexpr):
    uniform = radius_word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # abs(): near 1 the logarithm instruction has an error of 2^-22 and may be positive.
    radius = fast_sqrt(tl.abs(fast_log2(uniform, FAST)) * 1.3862943611198906, FAST)
    if FAST:
        # The word as a signed number is the same angle within half a turn of zero, where the
        # special-function sine is most accurate.
        turn = angle_word.to(tl.int32, bitcast=True).to(tl.float32)
        angle = turn * 1.4629180792671596e-09 + 7.314590396335798e-10
        cos = special(angle, "cos.approx.ftz.f32 $0, $1;")
        sin = special(angle, "sin.approx.ftz.f32 $0, $1;")
        return radius * cos, radius * sin
    else:
        sin, cos = sincos_turn(angle_word)
        return radius * cos, radius * sin


@triton.jit
def box_muller_double(radius_word, angle_word):
    radius = tl.sqrt(
        -2.0 * tl.log((radius_word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10)
    )
    angle = 6.283185307179586476925 * (
        (angle_word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10
    )
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normal_pair(radius_word, angle_word, DTYPE: tl.constexpr, FAST: tl.constexpr):
    if tl.float64 == DTYPE:
        return box_muller_double(radius_word, angle_word)
    else:
        return fast_box_muller(radius_word, angle_word, FAST)


@triton.jit
def quad_normals(
    seed, stream, quad, R: tl.constexpr, L: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """The normals of an (R, L) tile whose rows are whole quads; ``quad`` is (R, L/4)."""
    w0, w1, w2, w3 = noise_words(seed, stream, quad)
    z0, z1 = normal_pair(w0, w1, DTYPE, FAST)
    z2, z3 = normal_pair(w2, w3, DTYPE, FAST)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [R, L])


@triton.jit
def scattered_normals(seed, stream, position, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """The normals of elements at any positions: a counter each, four times the work."""
    w0, w1, w2, w3 = noise_words(seed, stream, position >> 2)
    late = (position & 2) != 0
    first, second = normal_pair(tl.where(late, w2, w0), tl.where(late, w3, w1), DTYPE, FAST)
    return tl.where((position & 1) != 0, second, first)
