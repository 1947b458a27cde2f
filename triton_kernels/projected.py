"""The projected error function of a block of projections, in place, as in ``csrc/math``.

torch multiplies by the directions: float32 accuracy needs products without TF32, for which neither
Triton nor cuBLAS and rocBLAS use tensor cores, and the libraries are tuned. A block fits a GPU's L2
cache, so that another pass over it costs little.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import plan

__all__ = ["projected_error_"]

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_OVER_PI = tl.constexpr(0.7978845608028654)
WARPS = 4
TILE_BYTES = 16 * 32 * WARPS  # a vector a thread, which leaves registers for erf
CHUNK = 4096  # elements that are added up in the projections' dtype


@triton.jit
def projected_error(
    projections, sums, count, chunks, SLOPES: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr
):
    """Adds t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2) over the program's chunks to its element
    of ``sums``; with SLOPES, replaces t by the slope erf(t / sqrt 2)."""
    program = tl.program_id(0)
    total = tl.load(sums + program)
    for chunk in range(program, chunks, tl.num_programs(0)):
        values = tl.zeros([TILE], projections.dtype.element_ty)
        for tile in range(0, CHUNK, TILE):
            first = tl.cast(chunk, tl.int64) * CHUNK + tile
            present = tl.arange(0, TILE) < count - first
            at = projections + first + tl.arange(0, TILE)
            t = tl.load(at, mask=present, other=0.0)
            slope = tl.math.erf(t * ROOT_HALF)
            value = t * slope + ROOT_TWO_OVER_PI * tl.exp(t * t * -0.5)
            values += tl.where(present, value, 0.0)
            if SLOPES:
                tl.store(at, slope, mask=present)
        total += tl.sum(values).to(tl.float64)
    tl.store(sums + program, total)


def _check(projections: Tensor, sums: Tensor) -> None:
    """The rules and sentences of ``csrc/binding/projected.cpp``."""
    if projections.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"projections must be float32 or float64; got {projections.dtype}")
    if not projections.is_contiguous():
        raise ValueError(
            "projections must be contiguous, their slopes take their place; got strides "
            f"{projections.stride()}"
        )
    if sums.dtype != torch.float64 or sums.dim() != 1 or not len(sums) or not sums.is_contiguous():
        raise ValueError(
            "sums must be a contiguous vector of torch.float64, not empty; got "
            f"{sums.dtype} of shape {tuple(sums.shape)}"
        )
    if sums.device != projections.device:
        raise ValueError("sums must be on the device of the projections")


def projected_error_(projections: Tensor, sums: Tensor, slopes: bool) -> None:
    """Adds the projected error function of the projections to ``sums``, a program an element, and
    with ``slopes`` replaces them by their slopes. Equal inputs give equal bits."""
    _check(projections, sums)
    count = projections.numel()
    if count == 0:
        return
    chunks, tile = plan.ceil_div(count, CHUNK), TILE_BYTES // projections.element_size()
    with torch.cuda.device_of(projections):
        projected_error[(min(chunks, sums.numel()),)](
            projections, sums, count, chunks, slopes, tile, CHUNK, num_warps=WARPS
        )
