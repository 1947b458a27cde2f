"""The layout of the groups: of a layer's groups in memory (host), and of a program's groups and
tiles within it (kernels).

Every layer is ``outer x inner`` groups of ``runs x length`` elements each, as in
``csrc/common/layout.cpp``. The axes come from:

========  ===========================================  ==================================
kind      rows                                         columns (channels_last, (N, C))
========  ===========================================  ==================================
batch     1 x C groups of N runs of spatial            1 x C columns of N spatial rows
layer     samples x 1 groups of 1 run of n             -
instance  N x C groups of 1 run of spatial             N x C columns of spatial rows
group     N x G groups of C/G runs of spatial          N x G groups of spatial runs of C/G
========  ===========================================  ==================================

A tile has R rows of L neighbouring elements. ``Spec.LAYOUT`` is what its rows are:

* ``ROWS``: R groups of one run each; K tiles, one after the other, cover a group.
* ``GROUP``: R chunks of one group, whose runs (a sample's part of a channel) are cut into chunks.
* ``COLUMNS``: R rows of a matrix whose columns are groups: channels_last, or (N, C).

The numbers of a group have the shape (R, 1), or () if R is 1, in ROWS, () in GROUP and (1, L) in
COLUMNS, and broadcast against the tile. Where a run does not begin on a multiple of four of the
noise's order, its chunks begin up to three elements earlier (``SHIFTED``), so that a chunk has
whole halves of the normals of a Philox counter.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..config import Config
from .noise import octet_normals, quad_normals, scattered_normals
from .params import (
    COLUMNS,
    OCTETS,
    PER_ELEMENT,
    PER_GROUP,
    PER_GROUP_ELEMENT,
    PER_RUN,
    QUADS,
    ROWS,
    number,
)

__all__ = ["Layout", "Strides", "make_layout", "natural_like"]


class Strides(NamedTuple):
    """Strides in elements; the innermost axis always has stride 1."""

    outer: int
    inner: int
    run: int


class Layout(NamedTuple):
    """How the groups of a layer lie in memory: outer x inner groups of runs x length elements."""

    columns: bool  # neighbouring elements belong to different groups
    outer: int
    inner: int
    runs: int
    length: int
    affine: int  # what an element of the weight belongs to, PER_*
    noise: Strides  # of the canonical order of the noise
    # the layer
    kind: str
    normalized_ndim: int
    channels_last: bool  # channels are innermost

    @property
    def groups(self) -> int:
        return self.outer * self.inner

    @property
    def group_size(self) -> int:
        return self.runs * self.length

    def strides(self, tensor: Tensor) -> Strides | None:
        """The tensor's strides in this layout; None if its memory does not have this layout."""
        if self.kind == "layer":
            lead = tensor.dim() - self.normalized_ndim
            outer, inner = _merged(tensor, 0, lead), _merged(tensor, lead, tensor.dim())
            return None if outer is None or inner != 1 else Strides(outer, 0, 0)
        spatial = _merged(tensor, 2, tensor.dim())
        sample, channel = _axis(tensor, 0), _axis(tensor, 1)
        if spatial is None:
            return None
        if not self.channels_last:
            if spatial != 1:
                return None
            if self.kind == "batch":
                return Strides(0, channel, sample)
            width = self.runs if self.kind == "group" else 1
            return Strides(sample, channel * width, channel)
        if tensor.size(1) > 1 and channel != 1:
            return None
        size = math.prod(tensor.shape[2:])
        if self.kind != "batch":
            return Strides(sample, self.length, spatial if size > 1 else 0)
        if size == 1:
            return Strides(0, 1, sample)
        follows = tensor.size(0) == 1 or sample == spatial * size  # not if the samples are expanded
        return Strides(0, 1, spatial) if follows else None

    def dense(self, tensor: Tensor) -> Tensor:
        """A copy in this layout."""
        if self.kind == "layer" or not self.channels_last:
            return tensor.contiguous()
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)


def _merged(tensor: Tensor, begin: int, end: int) -> int | None:
    """The stride of dimensions [begin, end) as one axis; None if no stride fits them all. An axis
    of one element has stride 1, whatever the tensor reports."""
    stride, expected = None, 0
    for i in reversed(range(begin, end)):
        if tensor.size(i) == 1:
            continue
        if stride is None:
            stride = tensor.stride(i)
        elif tensor.stride(i) != expected:
            return None
        expected = tensor.stride(i) * tensor.size(i)
    return 1 if stride is None else stride


def _axis(tensor: Tensor, i: int) -> int:
    return 0 if tensor.size(i) == 1 else tensor.stride(i)


def _channel_layout(input: Tensor, config: Config, channels_last: bool) -> Layout:
    samples, channels = input.shape[:2]
    spatial = math.prod(input.shape[2:])
    one, element = int(PER_GROUP.value), int(PER_GROUP_ELEMENT.value)
    common = (config.kind, 0, channels_last)
    if config.kind == "group":
        groups = config.num_groups
        width = channels // groups
        if channels_last:
            noise = Strides(channels * spatial, width, channels)
            return Layout(False, samples, groups, spatial, width, element, noise, *common)
        noise = Strides(channels * spatial, width * spatial, spatial)
        run = int(PER_RUN.value) if width > 1 else one
        return Layout(False, samples, groups, width, spatial, run, noise, *common)
    if config.kind == "batch":
        if channels_last:
            noise = Strides(0, 1, channels)
            return Layout(True, 1, channels, samples * spatial, 1, one, noise, *common)
        noise = Strides(0, spatial, channels * spatial)
        return Layout(False, 1, channels, samples, spatial, one, noise, *common)
    if channels_last:
        noise = Strides(channels * spatial, 1, channels)
        return Layout(True, samples, channels, spatial, 1, one, noise, *common)
    noise = Strides(channels * spatial, spatial, 0)
    return Layout(False, samples, channels, 1, spatial, one, noise, *common)


def make_layout(input: Tensor, config: Config, noisy: bool) -> Layout:
    """The layout of a pass over a non-empty input.

    With noise it is the noise's order, so that neighbours share a counter; else that of the input
    and of the tensor that ``torch.empty_like`` makes of it.
    """
    if config.kind == "layer":
        lead = input.dim() - config.normalized_ndim
        size = math.prod(input.shape[lead:])
        samples = math.prod(input.shape[:lead])
        noise = Strides(size, 0, 0)
        element = int(PER_ELEMENT.value)
        ndim = config.normalized_ndim
        return Layout(False, samples, 1, 1, size, element, noise, "layer", ndim, False)
    if math.prod(input.shape[2:]) == 1:
        return _channel_layout(input, config, True)
    if noisy:
        return _channel_layout(input, config, config.channels_last)
    output = torch.empty_like(input)
    rows, columns = (_channel_layout(input, config, last) for last in (False, True))
    if rows.strides(input) is not None and rows.strides(output) is not None:
        return rows
    if columns.strides(output) is None:
        return rows
    fits = columns.strides(input) is not None or rows.strides(output) is None
    return columns if fits else rows


def natural_like(input: Tensor, layout: Layout) -> Tensor:
    """An empty tensor in this layout."""
    if layout.kind == "layer" or not layout.channels_last:
        return torch.empty(input.shape, dtype=input.dtype, device=input.device)
    last = (input.size(0), *input.shape[2:], input.size(1))
    return torch.empty(last, dtype=input.dtype, device=input.device).movedim(-1, 1)


# --- in kernels ----------------------------------------------------------------------------------


class Place(NamedTuple):
    """A program's groups."""

    group: Any
    outer: Any
    inner: Any
    present: Any  # False beyond the last group
    noise: Any  # where they begin in the noise's order (in COLUMNS, the first column)


class Tile(NamedTuple):
    """The element in row r and place j lies at run[r] and column[r, j] = first[r] + j."""

    run: Any
    first: Any
    column: Any
    inside: Any  # part of the group
    mask: Any  # inside, and the group is present


@triton.jit
def zeros(S: tl.constexpr):
    R: tl.constexpr = S.R
    L: tl.constexpr = S.L
    if S.DOUBLE:
        return tl.zeros([R, L], tl.float64)
    else:
        return tl.zeros([R, L], tl.float32)


@triton.jit
def real(x, S: tl.constexpr):
    """Storage to compute type."""
    if S.DOUBLE and x.dtype.primitive_bitwidth == 16:
        return x.to(tl.float32).to(tl.float64)
    elif S.DOUBLE:
        return x.to(tl.float64)
    else:
        return x.to(tl.float32)


@triton.jit
def any_group(condition, S: tl.constexpr):
    """Whether a condition that selects the series path holds for any group of the program."""
    if not S.SERIES:
        return False
    elif S.SINGLE:
        return condition
    else:
        return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def aligned(x, S: tl.constexpr):
    """x, a multiple of S.ALIGN, in a form from which the compiler derives that."""
    return x // S.ALIGN * S.ALIGN


@triton.jit
def locate_group(block, geometry, S: tl.constexpr):
    by_outer, by_inner = geometry.noise_outer, geometry.noise_inner
    if S.LAYOUT == COLUMNS:
        tiles = tl.cdiv(geometry.inner, S.L)
        outer = block // tiles
        first = (block - outer * tiles) * S.L
        inner = first + tl.arange(0, S.L)[None, :]
        group = outer * geometry.inner + inner
        present = inner < aligned(geometry.inner, S)
        return Place(group, outer, inner, present, tl.cast(outer, tl.int64) * by_outer + first)
    else:
        group = block
        if not S.SINGLE:
            group = block * S.R + tl.arange(0, S.R)[:, None]
        outer = group // geometry.inner
        inner = group - outer * geometry.inner
        noise = tl.cast(outer, tl.int64) * by_outer + tl.cast(inner, tl.int64) * by_inner
        if S.SINGLE:
            return Place(group, outer, inner, True, noise)
        else:
            return Place(group, outer, inner, group < geometry.groups, noise)


@triton.jit
def index(i, S: tl.constexpr):
    """A number that will be multiplied by a stride."""
    if S.WIDE:
        return tl.cast(i, tl.int64)
    else:
        return i


@triton.jit
def tile_rows(geometry, S: tl.constexpr):
    """Rows of tiles that a group has, in GROUP and COLUMNS."""
    if S.LAYOUT == COLUMNS:
        return geometry.runs
    else:
        return geometry.runs * geometry.chunks


@triton.jit
def locate_tile(i, place, geometry, S: tl.constexpr):
    """The tile whose first row is number ``i`` of its group; in ROWS, the group's tile number i."""
    row = i + tl.arange(0, S.R)[:, None]
    if S.LAYOUT == COLUMNS:
        inside = row < geometry.runs
        return Tile(index(row, S), 0, 0, inside, inside & place.present)
    else:
        lane = tl.arange(0, S.L)[None, :]
        length = aligned(geometry.length, S)
        if S.LAYOUT == ROWS:
            run = 0
            first = i * S.L
            if S.SHIFTED:
                first = first - (place.noise & 3).to(tl.int32)
            column = first + lane
            inside = column < length
        else:
            # the divisor is known before the launch: a product and a shift
            high = tl.umulhi((row * 4).to(tl.uint32), tl.cast(geometry.factor, tl.uint32))
            run = (high >> geometry.bits).to(tl.int32)
            first = (row - run * geometry.chunks) * S.L
            within = run < geometry.runs
            run = index(run, S)
            if S.SHIFTED:
                first = first - ((place.noise + run * geometry.noise_run) & 3).to(tl.int32)
            column = first + lane
            inside = within & (column < length)
        if S.SHIFTED:
            inside = inside & (column >= 0)
        if S.SINGLE:
            return Tile(run, first, column, inside, inside)
        else:
            return Tile(run, first, column, inside, inside & place.present)


@triton.jit
def address(operand, place, tile, S: tl.constexpr):
    by_outer, by_inner, by_run = operand.strides
    offset = tl.cast(place.outer, tl.int64) * aligned(by_outer, S)
    if S.LAYOUT == COLUMNS:
        return operand.data + tile.run * aligned(by_run, S) + (offset + place.inner)
    else:
        offset += tl.cast(place.inner, tl.int64) * aligned(by_inner, S)
        if S.LAYOUT == ROWS:
            return operand.data + offset + tile.column
        else:
            return operand.data + (offset + tile.run * aligned(by_run, S)) + tile.column


@triton.jit
def read(operand, place, tile, S: tl.constexpr):
    """The elements of a tile; those outside of its groups are zeros."""
    return real(tl.load(address(operand, place, tile, S), mask=tile.mask, other=0.0), S)


@triton.jit
def write(operand, place, tile, x, S: tl.constexpr):
    tl.store(address(operand, place, tile, S), x, mask=tile.mask)


@triton.jit
def keep(x, tile, S: tl.constexpr):
    """x with zeros for elements outside of the group."""
    if S.EVEN:
        return x
    else:
        return tl.where(tile.inside, x, 0.0)


@triton.jit
def parameter(pointer, missing, place, tile, geometry, S: tl.constexpr):
    """A tile's elements of the weight or bias, in a shape that broadcasts against the tile."""
    if pointer is None:
        return number(missing, S)
    elif S.AFFINE == PER_GROUP:
        return real(tl.load(pointer + place.inner, mask=place.present, other=0.0), S)
    elif S.AFFINE == PER_RUN:
        at = pointer + place.inner * geometry.runs + tile.run
        return real(tl.load(at, mask=tile.run < geometry.runs, other=0.0), S)
    elif S.AFFINE == PER_ELEMENT:
        return real(tl.load(pointer + tile.column, mask=tile.inside, other=0.0), S)
    else:
        at = pointer + place.inner * geometry.length + tile.column
        return real(tl.load(at, mask=tile.inside, other=0.0), S)


@triton.jit
def normals(key, stream, place, tile, by_run, S: tl.constexpr):
    """The standard normals of a tile's elements; ``by_run`` is a stride of the noise's order."""
    lead = place.noise + tile.run * by_run + tile.first
    if not S.WIDE:
        lead = lead.to(tl.int32)
    DTYPE: tl.constexpr = tl.float64 if S.DOUBLE else tl.float32
    if S.NOISE == OCTETS:
        octet = (lead >> 3) + tl.arange(0, S.L // 8)[None, :]
        return octet_normals(key, stream, octet, S.R, S.L, DTYPE, S.FAST)
    elif S.NOISE == QUADS:
        quad = (lead >> 2) + tl.arange(0, S.L // 4)[None, :]
        return quad_normals(key, stream, quad, S.R, S.L, DTYPE, S.FAST)
    else:
        return scattered_normals(key, stream, lead + tl.arange(0, S.L)[None, :], DTYPE, S.FAST)
