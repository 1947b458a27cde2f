"""Small kernels around single device functions of ``triton_kernels``."""

import triton
import triton.language as tl

from normnorm.triton_kernels.math import lambda_gradient, make_exponents, needs_series
from normnorm.triton_kernels.noise import PHILOX_ROUNDS, noise_words
from normnorm.triton_kernels.params import Numbers
from normnorm.triton_kernels.rounds import gradient_round


@triton.jit
def words(seed, octets, out, stream, N: tl.constexpr, WIDE: tl.constexpr):
    """Row 0: how many words of an octet differ from tl.philox; rows 1 to 4: its words."""
    i = tl.arange(0, N)
    each = tl.load(octets + i)
    zero = tl.full([N], 0, tl.uint32)
    p0, p1, p2, p3 = tl.philox(
        tl.load(seed), each.to(tl.uint32), (each >> 32).to(tl.uint32),
        tl.cast(stream, tl.uint32) + zero, zero, PHILOX_ROUNDS,
    )  # fmt: skip
    if not WIDE:
        each = each.to(tl.int32)
    w0, w1, w2, w3 = noise_words(tl.load(seed), stream, each)
    differ = (w0 != p0).to(tl.int64) + (w1 != p1).to(tl.int64)
    tl.store(out + i, differ + (w2 != p2).to(tl.int64) + (w3 != p3).to(tl.int64))
    tl.store(out + N + i, w0.to(tl.int64))
    tl.store(out + 2 * N + i, w1.to(tl.int64))
    tl.store(out + 3 * N + i, w2.to(tl.int64))
    tl.store(out + 4 * N + i, w3.to(tl.int64))


@triton.jit
def slopes(at, lmbdas, out, groups, N: tl.constexpr):
    """x, dpsi/dh and dpsi/dlmbda at every h for every lmbda."""
    i = tl.arange(0, N)
    h = tl.load(at + i)
    for group in range(groups):
        lmbda = tl.load(lmbdas + group)
        none = 0.0 * lmbda
        exponents = make_exponents(lmbda, none)
        numbers = Numbers(none, none, none, 1.0 + none, none, none)
        gradient = lambda_gradient(lmbda, none, none, 1.0 + none, numbers, 2)
        psi_h, psi_lmbda, _, x = gradient_round(
            h, 1.0 + 0.0 * h, exponents, gradient, needs_series(exponents), False
        )
        tl.store(out + (3 * group) * N + i, x)
        tl.store(out + (3 * group + 1) * N + i, psi_h)
        tl.store(out + (3 * group + 2) * N + i, psi_lmbda)
