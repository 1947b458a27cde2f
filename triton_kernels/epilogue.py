"""Operations fused into a pass, as in ``csrc/cuda/epilogue.cuh``: the sum of input and residual
before normalization, a residual and an activation after the affine map, the activation's mask
before the backward pass. An operand without data leaves nothing in the compiled code."""

import triton
import triton.language as tl

from .layout import read

# Indices in ACTIVATIONS of normnorm/config.py.
RELU = tl.constexpr(1)


@triton.jit
def with_residual(x, residual, place, tile, S: tl.constexpr):
    """x plus the residual's tile, in the compute type."""
    if residual.data is None:
        return x
    else:
        return x + read(residual, place, tile, S)


@triton.jit
def stored_sum(u, residual, place, tile, S: tl.constexpr):
    """u plus the residual's tile, in the storage type. The pass normalizes this rounded sum, which
    is what the backward pass reads."""
    return with_residual(u, residual, place, tile, S).to(residual.data.dtype.element_ty)


@triton.jit
def activated(y, S: tl.constexpr):
    if S.ACTIVATION == RELU:
        return tl.where(y <= 0, 0.0, y)  # not maximum(): a NaN must stay NaN
    else:
        return y


@triton.jit
def masked(g, y, S: tl.constexpr):
    """The gradient before the activation, whose output is y; ReLU's passes where y is NaN."""
    if S.ACTIVATION == RELU:
        return tl.where(y <= 0, 0.0, g)
    else:
        return g


@triton.jit
def read_gradient(grad, result, place, tile, S: tl.constexpr):
    """A tile of the gradient before the activation, whose output is ``result``."""
    g = read(grad, place, tile, S)
    if S.ACTIVATION > 0:
        return masked(g, read(result, place, tile, S), S)
    else:
        return g
