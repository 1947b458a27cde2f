"""Where a program finds its groups in the tensors: three walks over one kind of tile.

A tile has R rows of L neighbouring elements, and a walk says what its rows are:

* ``ROWS``: R groups, each of one run of elements; a group takes K tiles one behind the other.
* ``GROUP``: R chunks of one group, whose runs (a sample's share of a channel) are cut into chunks.
* ``COLUMNS``: R rows of a matrix whose columns are groups: channels_last, or (N, C).

The numbers of a group have the shape (R, 1) (or (), where R is 1), () or (1, L) in turn, so that
they broadcast against the tile. Where a run does not begin on a multiple of four of the noise's
order, the tiles are shifted (``SHIFTED``) so that no Philox counter serves two chunks.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from .noise import quad_normals, scattered_normals

ROWS = tl.constexpr(0)
GROUP = tl.constexpr(1)
COLUMNS = tl.constexpr(2)

# What a weight belongs to: a group, a run of a group, a place in the run of every group, or a place
# in the run of the groups of one inner index.
PER_GROUP = tl.constexpr(0)
PER_RUN = tl.constexpr(1)
PER_ELEMENT = tl.constexpr(2)
PER_GROUP_ELEMENT = tl.constexpr(3)

NO_NOISE = tl.constexpr(0)
QUADS = tl.constexpr(1)
SCATTERED = tl.constexpr(2)


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for.

    Attributes:
        WALK, AFFINE, NOISE: see above.
        R, L: rows and columns of a tile.
        K: tiles of a group that a resident kernel holds.
        ORDER: of the Newton step.
        CARE: an exponent may be small (core.py); not so where lambda is 1 by configuration.
        FROZEN: the statistics are given.
        EVEN: the tiles of a group have no element outside of it.
        SHIFTED: chunks begin up to three elements before their run.
        WIDE: offsets and noise positions within a group do not fit into 31 bits.
        ALIGN: all group and run offsets are multiples of it.
        FAST: special-function instructions of NVIDIA GPUs.
        DOUBLE: computed in float64.
        SPLITS: at least as many as the programs a group, a power of two.
        LANES: neighbouring elements of a row that one thread holds, as far as the layout tells.
        RELU: the positive part of the output is taken, and the gradient masked by it.
    """

    WALK: int
    R: int
    L: int
    K: int = 1
    AFFINE: int = 0
    NOISE: int = 0
    ORDER: int = 2
    CARE: bool = True
    FROZEN: bool = False
    EVEN: bool = False
    SHIFTED: bool = False
    WIDE: bool = False
    ALIGN: int = 1
    FAST: bool = False
    DOUBLE: bool = False
    SPLITS: int = 1
    LANES: int = 1
    RELU: bool = False

    @property
    def ALONE(self) -> bool:
        """A program has one group: its numbers are scalars."""
        return GROUP.value == self.WALK or (ROWS.value == self.WALK and self.R == 1)


@triton.jit
def number(x, S: tl.constexpr):
    """A scalar argument, which comes as float64, in the compute type."""
    if S.DOUBLE:
        return tl.full([], x, tl.float64)
    else:
        return tl.full([], x, tl.float32)


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
def total(x, S: tl.constexpr):
    """The sum of a tile over each group."""
    if S.WALK == COLUMNS:
        return tl.sum(x, 0)[None, :]
    elif S.ALONE:
        return tl.sum(x)
    else:
        return tl.sum(x, 1)[:, None]


@triton.jit
def sum_zeros(S: tl.constexpr):
    """Where tiles are added up on their way to total()."""
    R: tl.constexpr = S.R
    L: tl.constexpr = S.L if S.WALK == COLUMNS else S.L // S.LANES
    if S.DOUBLE:
        return tl.zeros([R, L], tl.float64)
    else:
        return tl.zeros([R, L], tl.float32)


@triton.jit
def add(sums, x, S: tl.constexpr):
    """A tile added to sum_zeros(): the elements that a thread holds of a row first, so that a
    sum takes one register a thread and not one an element."""
    R: tl.constexpr = S.R
    L: tl.constexpr = S.L
    LANES: tl.constexpr = S.LANES
    if S.WALK == COLUMNS or LANES == 1:
        return sums + x
    else:
        return sums + tl.sum(tl.reshape(x, [R, L // LANES, LANES]), 2)


@triton.jit
def anywhere(condition, S: tl.constexpr):
    """Whether any group of the program needs care."""
    if not S.CARE:
        return False
    elif S.ALONE:
        return condition
    else:
        return tl.max(condition.to(tl.int32)) > 0


@triton.jit
def aligned(x, S: tl.constexpr):
    """x, a multiple of S.ALIGN, in a form from which the compiler sees that it is one."""
    return x // S.ALIGN * S.ALIGN


@triton.jit
def locate_group(block, walk, S: tl.constexpr):
    """(group, outer, inner, first column, present) of a program's groups."""
    groups, inner, _, _, _, _, _ = walk
    if S.ALONE:
        outer = block // inner
        return block, outer, block - outer * inner, 0, True
    elif S.WALK == ROWS:
        group = block * S.R + tl.arange(0, S.R)[:, None]
        outer = group // inner
        return group, outer, group - outer * inner, 0, group < groups
    else:
        tiles = tl.cdiv(inner, S.L)
        outer = block // tiles
        first = (block - outer * tiles) * S.L
        column = first + tl.arange(0, S.L)[None, :]
        return outer * inner + column, outer, column, first, column < aligned(inner, S)


@triton.jit
def group_offset(place, strides, S: tl.constexpr):
    """Where a program's groups begin in a tensor."""
    _, outer, inner, _, _ = place
    by_outer, by_inner, _ = strides
    base = tl.cast(outer, tl.int64) * aligned(by_outer, S)
    if S.WALK == COLUMNS:
        return base + inner
    else:
        return base + tl.cast(inner, tl.int64) * aligned(by_inner, S)


@triton.jit
def noise_offset(place, at_noise, S: tl.constexpr):
    """Where a program's groups (its first column) begin in the order of the noise."""
    _, outer, inner, first, _ = place
    by_outer, by_inner, _ = at_noise
    if S.WALK == COLUMNS:
        return tl.cast(outer, tl.int64) * by_outer + first
    else:
        return tl.cast(outer, tl.int64) * by_outer + tl.cast(inner, tl.int64) * by_inner


@triton.jit
def index(i, S: tl.constexpr):
    """A number that is multiplied by a stride."""
    if S.WIDE:
        return tl.cast(i, tl.int64)
    else:
        return i


@triton.jit
def locate_tile(i, place, walk, noise, by_run, S: tl.constexpr):
    """(run, first, column, inside, mask) of the tile whose first row is number ``i`` of its group
    (for ROWS, of the tile number ``i``): the element in row r and place j lies at run[r] and
    column[r, j] = first[r] + j; ``inside`` where the group has it, ``mask`` where memory has it.
    ``noise`` and ``by_run`` are the noise's group offset and stride."""
    _, _, runs, length, chunks, factor, bits = walk
    present = place[4]
    row = i + tl.arange(0, S.R)[:, None]
    if S.WALK == COLUMNS:
        inside = row < runs
        return index(row, S), 0, 0, inside, inside & present
    else:
        lane = tl.arange(0, S.L)[None, :]
        length = aligned(length, S)
        if S.WALK == ROWS:
            run = 0
            first = i * S.L
            if S.SHIFTED:
                first = first - (noise & 3).to(tl.int32)
            column = first + lane
            inside = column < length
        else:
            # division by a number known before the launch: a product and a shift
            high = tl.umulhi((row * 4).to(tl.uint32), tl.cast(factor, tl.uint32))
            run = (high >> bits).to(tl.int32)
            first = (row - run * chunks) * S.L
            within = run < runs
            run = index(run, S)
            if S.SHIFTED:
                first = first - ((noise + run * by_run) & 3).to(tl.int32)
            column = first + lane
            inside = within & (column < length)
        if S.SHIFTED:
            inside = inside & (column >= 0)
        if S.ALONE:
            return run, first, column, inside, inside
        else:
            return run, first, column, inside, inside & present


@triton.jit
def address(tensor, offset, strides, tile, S: tl.constexpr):
    run, _, column, _, _ = tile
    if S.WALK == ROWS:
        return tensor + offset + column
    elif S.WALK == GROUP:
        return tensor + (offset + run * aligned(strides[2], S)) + column
    else:
        return tensor + run * aligned(strides[2], S) + offset


@triton.jit
def read(tensor, offset, strides, tile, S: tl.constexpr):
    """The elements of a tile; those outside its groups are zeros."""
    return real(tl.load(address(tensor, offset, strides, tile, S), mask=tile[4], other=0.0), S)


@triton.jit
def write(tensor, offset, strides, tile, x, S: tl.constexpr):
    tl.store(address(tensor, offset, strides, tile, S), x, mask=tile[4])


@triton.jit
def keep(x, tile, S: tl.constexpr):
    """x with zeros for elements outside of the group."""
    if S.EVEN:
        return x
    else:
        return tl.where(tile[3], x, 0.0)


@triton.jit
def parameter(pointer, missing, place, tile, walk, S: tl.constexpr):
    """A weight's (or bias's) elements for a tile, in a shape that broadcasts against it."""
    if pointer is None:
        return number(missing, S)
    else:
        _, _, runs, length, _, _, _ = walk
        _, _, inner, _, present = place
        run, _, column, inside, _ = tile
        if S.AFFINE == PER_GROUP:
            return real(tl.load(pointer + inner, mask=present, other=0.0), S)
        elif S.AFFINE == PER_RUN:
            return real(tl.load(pointer + inner * runs + run, mask=run < runs, other=0.0), S)
        elif S.AFFINE == PER_ELEMENT:
            return real(tl.load(pointer + column, mask=inside, other=0.0), S)
        else:
            return real(tl.load(pointer + inner * length + column, mask=inside, other=0.0), S)


@triton.jit
def normals(seed, stream, noise, by_run, tile, S: tl.constexpr):
    """The standard normals of a tile's elements."""
    run, first, _, _, _ = tile
    lead = noise + run * by_run + first
    if not S.WIDE:
        lead = lead.to(tl.int32)
    DTYPE: tl.constexpr = tl.float64 if S.DOUBLE else tl.float32
    if S.NOISE == QUADS:
        quad = (lead >> 2) + tl.arange(0, S.L // 4)[None, :]
        return quad_normals(seed, stream, quad, S.R, S.L, DTYPE, S.FAST)
    else:
        return scattered_normals(seed, stream, lead + tl.arange(0, S.L)[None, :], DTYPE, S.FAST)
