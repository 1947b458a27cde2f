"""The noise: Philox4x32-7 and Box-Muller; the words equal those of ``normnorm/noise.py`` exactly.

A counter's four words give eight normals. ``tl.randn`` would take one normal from each counter, and
its cosine has a slow path for large angles that needs a stack frame.
"""

import triton
import triton.language as tl

from .math import fast_log2, fast_sqrt, special

PHILOX_ROUNDS = tl.constexpr(7)


@triton.jit
def philox_rounds(c0, c1, c2, c3, k0, k1):
    """The rounds on uint32 words, with the result of ``tl.philox``. One 64-bit multiplication gives
    both halves of a product; ``tl.philox`` multiplies twice."""
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
def noise_words(seed, stream, octet):
    """The four words of elements 8 octet .. 8 octet + 7; ``octet`` is int32 or int64."""
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1 = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    zero = tl.full([], 0, tl.uint32)
    if octet.dtype == tl.int64:
        c0, c1 = octet.to(tl.uint32), (octet >> 32).to(tl.uint32)
    else:
        c0, c1 = octet.to(tl.uint32, bitcast=True), zero
    return philox_rounds(c0, c1, tl.cast(stream, tl.uint32), zero, k0, k1)


@triton.jit
def turn_word(word, following):
    """The angle, in units of 2^-32 turns, of the pair of normals of a word and the next word."""
    product = tl.mul(word, 0x9E3779B9, sanitize_overflow=False).to(tl.uint32)
    return tl.add(product, following, sanitize_overflow=False)


@triton.jit
def on_circle(radius, turn):
    """radius (cos, sin) of 2^-32 ``turn`` turns; integers subtract the nearest half turn first."""
    half_turn = tl.add(turn, 0x40000000, sanitize_overflow=False) & 0x80000000
    rest = tl.sub(turn, half_turn, sanitize_overflow=False).to(tl.int32, bitcast=True)
    x = rest.to(tl.float32) * 4.6566128730773926e-10
    y = x * x
    s = ((y * 7.722012784e-02 - 5.980451738e-01) * y + 2.550031377e00) * y - 5.167706879e00
    s = (s * y + 3.141592580e00) * x
    c = ((y * 2.200806433e-01 - 1.332093861e00) * y + 4.058451341e00) * y - 4.934795518e00
    c = c * y + 1.0
    bits = radius.to(tl.uint32, bitcast=True) ^ half_turn
    radius = bits.to(tl.float32, bitcast=True)
    return radius * c, radius * s


@triton.jit
def fast_normal_pair(word, turn, FAST: tl.constexpr):
    uniform = word.to(tl.float32) * 2.3283064365386963e-10 + 1.1641532182693481e-10
    # abs(): near 1 the logarithm instruction has an error of 2^-22 and may be positive.
    radius = fast_sqrt(tl.abs(fast_log2(uniform, FAST)) * 1.3862943611198906, FAST)
    if FAST:
        # Read as a signed integer, the angle lies within half a turn of zero, where the GPU's sine
        # instruction is most accurate.
        angle = turn.to(tl.int32, bitcast=True).to(tl.float32) * 1.4629180792671596e-09
        cos = special(angle, "cos.approx.ftz.f32 $0, $1;")
        sin = special(angle, "sin.approx.ftz.f32 $0, $1;")
        return radius * cos, radius * sin
    else:
        return on_circle(radius, turn)


@triton.jit
def normal_pair_double(word, turn):
    radius = tl.sqrt(-2.0 * tl.log((word.to(tl.float64) + 0.5) * 2.3283064365386962890625e-10))
    angle = 6.283185307179586476925 * (turn.to(tl.float64) * 2.3283064365386962890625e-10)
    return radius * tl.cos(angle), radius * tl.sin(angle)


@triton.jit
def normal_pair(word, following, DTYPE: tl.constexpr, FAST: tl.constexpr):
    turn = turn_word(word, following)
    if tl.float64 == DTYPE:
        return normal_pair_double(word, turn)
    else:
        return fast_normal_pair(word, turn, FAST)


@triton.jit
def octet_normals(
    seed, stream, octet, R: tl.constexpr, L: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """The normals of an (R, L) tile whose rows are whole octets; ``octet`` is (R, L/8)."""
    w0, w1, w2, w3 = noise_words(seed, stream, octet)
    z0, z1 = normal_pair(w0, w1, DTYPE, FAST)
    z2, z3 = normal_pair(w1, w2, DTYPE, FAST)
    z4, z5 = normal_pair(w2, w3, DTYPE, FAST)
    z6, z7 = normal_pair(w3, w0, DTYPE, FAST)
    even = tl.join(tl.join(z0, z4), tl.join(z2, z6))
    odd = tl.join(tl.join(z1, z5), tl.join(z3, z7))
    return tl.reshape(tl.join(even, odd), [R, L])


@triton.jit
def quad_normals(
    seed, stream, quad, R: tl.constexpr, L: tl.constexpr, DTYPE: tl.constexpr, FAST: tl.constexpr
):
    """The same for rows of whole quads, the halves of octets; ``quad`` is (R, L/4). Each quad takes
    a counter, twice the work, but threads with four neighbouring elements exchange no data."""
    w0, w1, w2, w3 = noise_words(seed, stream, quad >> 1)
    # a mask of all bits or none, because selecting with tl.where spilled two registers on sm_80
    late = tl.sub(0, (quad & 1).to(tl.uint32), sanitize_overflow=False)
    exchanged = (w0 ^ w2) & late
    a, b, c = w0 ^ exchanged, w1 ^ ((w1 ^ w3) & late), w2 ^ exchanged
    z0, z1 = normal_pair(a, b, DTYPE, FAST)
    z2, z3 = normal_pair(b, c, DTYPE, FAST)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [R, L])


@triton.jit
def scattered_normals(seed, stream, position, DTYPE: tl.constexpr, FAST: tl.constexpr):
    """The normals of elements at any positions. Each takes a counter, eight times the work."""
    w0, w1, w2, w3 = noise_words(seed, stream, position >> 3)
    late = (position & 4) != 0
    a, b, c = tl.where(late, w2, w0), tl.where(late, w3, w1), tl.where(late, w0, w2)
    second = (position & 2) != 0
    first, other = normal_pair(tl.where(second, b, a), tl.where(second, c, b), DTYPE, FAST)
    return tl.where((position & 1) != 0, other, first)
