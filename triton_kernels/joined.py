"""What a pass joins to itself, as in ``csrc/cpu/joined.h``: the residual stream's sum in front, a
residual and an activation behind the affine map, the activation's mask in front of the backward
pass. A pointer that is None leaves nothing behind in compiled code."""

import triton
import triton.language as tl

from .walk import group_offset, read


@triton.jit
def with_residual(x, residual, place, at_residual, tile, S: tl.constexpr):
    """A tile with the residual's added, in the compute type."""
    if residual is None:
        return x
    else:
        return x + read(residual, group_offset(place, at_residual, S), at_residual, tile, S)


@triton.jit
def stored_sum(u, residual, place, at_residual, tile, S: tl.constexpr):
    """The residual stream's sum as it will be stored: what is normalized is that, rounding and
    all, so that a backward pass, which reads it, sees the same numbers."""
    return with_residual(u, residual, place, at_residual, tile, S).to(residual.dtype.element_ty)


@triton.jit
def activated(y, S: tl.constexpr):
    if S.RELU:
        return tl.where(y <= 0, 0.0, y)  # no maximum: a NaN must stay NaN
    else:
        return y


@triton.jit
def masked(g, y):
    """What of a gradient passes through the activation that gave y: where that is NaN, all."""
    return tl.where(y <= 0, 0.0, g)


@triton.jit
def read_gradient(grad, offset, at_grad, result, place, at_result, tile, S: tl.constexpr):
    """A tile of the gradient in front of the activation, whose ``result`` tells what passed."""
    g = read(grad, offset, at_grad, tile, S)
    if S.RELU:
        return masked(g, read(result, group_offset(place, at_result, S), at_result, tile, S))
    else:
        return g
