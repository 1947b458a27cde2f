"""The plan of a pass: from shapes, strides, dtypes and configuration to a layout, tiles, warps and
programs, and what the kernels are compiled for. Remembered by those.

Nothing is tuned by timing: equal shapes give equal kernels and equal bits on every device.

======================================  ==========================================  ===============
group                                   kernel                                      device memory
======================================  ==========================================  ===============
fits the registers of a program         resident: a program a group, or several     1 read, 1 write
                                        short groups a program
larger                                  streaming: many programs a group, a launch  3-5 reads,
                                        a round                                     1 write
======================================  ==========================================  ===============
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..config import ACTIVATIONS, Config
from . import params, resident
from .layout import Layout, Strides, make_layout, natural_like
from .params import Geometry, Operand, Spec

# Elements of a group that a thread holds, of one number each forward and three backward.
FORWARD_HELD, BACKWARD_HELD = 32, 16
LARGEST_WARPS = 16
LARGEST_K = 8
# Warps of a persistent grid: they fill the registers of 132 multiprocessors. A constant, so that
# the order of the sums does not depend on the device.
PERSISTENT_WARPS = 2112
STREAM_WARPS = 4
LARGEST_SPLITS = 64
# Columns with few tiles need more programs each; above REDUCED_ABOVE a kernel of its own adds up
# their partial sums.
LARGEST_COLUMN_SPLITS = 512
REDUCED_ABOVE = 16
MOMENT_COLUMNS = 8  # of a program of that kernel
# Special-function instructions are NVIDIA's; the interpreter and AMD take Triton's functions.
FAST = torch.version.hip is None and isinstance(resident.forward, triton.runtime.JITFunction)


class Tiles(NamedTuple):
    R: int  # rows of a tile
    L: int  # elements of a row
    K: int  # tiles of a group that a resident kernel holds
    warps: int  # of a program
    splits: int = 1  # programs of a group in a streaming kernel


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _held(held: int, itemsize: int, align: int = 16) -> int:
    """Elements that a thread holds without spilling; unaligned addresses take registers too."""
    if itemsize == 8:
        return held // 4
    return held if align >= 4 else held // 2


def lanes(tiles: Tiles, align: int, itemsize: int) -> int:
    """Neighbouring elements of a row in a thread: a vector, if alignment and tile allow it."""
    each = max(1, tiles.R * tiles.L // (32 * tiles.warps))
    return min(16 // itemsize, each, math.gcd(align, 16), tiles.L)


def _vector(itemsize: int) -> int:
    """Elements of a 128-bit access, or of half a Philox counter where those are more."""
    return max(16 // itemsize, 4)


def row_tiles(length: int, groups: int, itemsize: int, held: int, align: int = 16) -> Tiles | None:
    """A group is one run, of K tiles of L elements; R groups a program."""
    held, vector = _held(held, itemsize, align), _vector(itemsize)
    best: tuple[float, Tiles] | None = None
    for log in range(4, max(5, power_of_two(length).bit_length())):
        L = 1 << log
        K = ceil_div(length, L)
        if K > LARGEST_K:
            continue
        for warps in (1, 2, 4, 8, LARGEST_WARPS)[: 5 if align >= 4 else 4]:
            for narrow in range(3):  # a whole vector a thread and tile, a half, a quarter
                each = vector >> narrow
                R = each * 32 * warps // L  # several short groups a program only within a warp
                if R > 1 and warps > 1:
                    continue
                # the backward pass holds more numbers of each group
                R = max(1, R if held > BACKWARD_HELD else R // 2)
                each = max(1, R * L // (32 * warps))
                if K * each > held or (R == 1 and each < vector >> narrow):
                    continue
                R = min(R, power_of_two(groups))
                # two tiles spill less than one of twice the size; with sixteen warps, four
                uneven = 0.01 * (K if R > 1 else abs(K - 2))
                if warps == LARGEST_WARPS:
                    uneven = 0.04 * abs(K - 4)
                cost = K * L * (1 + 0.06 * narrow + 0.02 * math.log2(warps) + uneven)
                if best is None or cost < best[0]:
                    best = (cost, Tiles(R, L, K, warps))
    return best[1] if best else None


def chunk_length(length: int, shifted: bool, tile: int) -> int:
    """The length of a run's chunks: the largest that wastes at most 6 % more than the best."""
    reach = length + 3 if shifted else length
    candidates = [1 << log for log in range(3, tile.bit_length()) if 1 << log <= max(tile, 8)]
    wasted = {L: ceil_div(reach, L) * L for L in candidates}
    least = min(wasted.values())
    return max(L for L in candidates if wasted[L] <= 1.06 * least)


def group_tiles(
    runs: int, length: int, shifted: bool, itemsize: int, held: int, align: int = 16
) -> Tiles | None:
    """A group is several runs, of K tiles of R chunks."""
    held, vector = _held(held, itemsize, align), _vector(itemsize)
    for warps in (4, 8, LARGEST_WARPS)[: 3 if align >= 4 else 2]:
        tile = 32 * warps * vector
        L = chunk_length(length, shifted, tile)
        chunks = runs * ceil_div(length + (3 if shifted else 0), L)
        R = min(tile // L, power_of_two(chunks))
        K = ceil_div(chunks, R)
        if K <= LARGEST_K and held * 32 * warps >= K * R * L:
            return Tiles(R, L, K, warps)
    return None


def column_tiles(rows: int, columns: int, itemsize: int, held: int) -> Tiles | None:
    """A group is a column, of K tiles of R rows."""
    # A thread holds the numbers of each of its columns: four columns, not a whole vector.
    held, vector = _held(min(held, 24), itemsize), 4
    L = min(32, max(4, power_of_two(columns)))
    for warps in (4, 8, LARGEST_WARPS):
        R = min(32 * warps * vector // L, power_of_two(rows))
        K = ceil_div(rows, R)
        if K <= LARGEST_K and held * 32 * warps >= K * R * L:
            return Tiles(R, L, K, warps)
    return None


def stream_tiles(
    columns: bool, groups: int, inner: int, runs: int, length: int, shifted: bool, itemsize: int
) -> Tiles:
    """Tiles of one vector a thread; enough programs a group to fill the device."""
    most = LARGEST_SPLITS
    if columns:
        L = min(64, max(4, power_of_two(inner)))
        R = 32 * STREAM_WARPS * 4 // L
        tiles, blocks = ceil_div(runs, R), ceil_div(inner, L) * (groups // inner)
        most = LARGEST_COLUMN_SPLITS
    else:
        tile = 32 * STREAM_WARPS * _vector(itemsize)
        L = chunk_length(length, shifted, tile)
        R = tile // L
        tiles = ceil_div(runs * ceil_div(length + (3 if shifted else 0), L), R)
        blocks = groups
    splits = ceil_div(2 * PERSISTENT_WARPS // STREAM_WARPS, blocks)
    return Tiles(R, L, 1, STREAM_WARPS, max(1, min(splits, ceil_div(tiles, 4), most)))


def persistent_programs(blocks: int, warps: int) -> int:
    """Programs that share ``blocks`` and keep sums over them."""
    return max(1, min(blocks, PERSISTENT_WARPS // warps))


def parameter_tiles(rows: int, length: int, itemsize: int) -> Tiles:
    """Of parameter_sums(), whose programs share the rows."""
    tile = 32 * STREAM_WARPS * _vector(itemsize)
    L = min(128, max(8, power_of_two(length)))
    R = min(tile // L, power_of_two(rows))
    columns = ceil_div(length, L)
    splits = ceil_div(PERSISTENT_WARPS // STREAM_WARPS, columns)
    return Tiles(R, L, 1, STREAM_WARPS, max(1, min(splits, ceil_div(rows, R), 256)))


@dataclass(frozen=True)
class Plan:
    """How one pass runs."""

    layout: Layout
    strides: tuple[Strides | None, ...]  # of the tensors, in their order; None: copied first
    tiles: Tiles
    resident: bool
    spec: Spec
    reduce_moments: Spec | None  # of the kernel between the rounds, where there is one
    geometry: Geometry
    blocks: int  # groups, or pieces of as many groups as a tile has rows or columns

    @property
    def left(self) -> int:
        """Partial sums of a group that the next kernel adds up."""
        return self.tiles.splits if self.reduce_moments is None else 1

    def read(self, tensor: Tensor, number: int) -> Operand:
        """Tensor ``number`` of those in ``strides``, or a copy in the layout."""
        at = self.strides[number]
        if at is None:
            tensor = self.layout.dense(tensor)
            at = self.layout.strides(tensor)
            assert at is not None
        return Operand(tensor, tuple(at))

    def written(self, output: Tensor, number: int) -> Operand:
        """An output, or a tensor in the layout that :func:`launch.promised` copies into it."""
        at = self.strides[number]
        if at is None:
            output = natural_like(output, self.layout)
            at = self.layout.strides(output)
            assert at is not None
        return Operand(output, tuple(at))


def _divisor(d: int) -> tuple[int, int]:
    """(factor, bits) with n // d = mulhi(4 n, factor) >> bits for n < 2^30 (Granlund and
    Montgomery 1994)."""
    bits = (d - 1).bit_length()
    return ceil_div(1 << (30 + bits), d), bits


def _align(layout: Layout, strides: tuple[Strides, ...]) -> int:
    """The largest power of two up to 16 that divides all offsets of runs and groups."""
    extents = (layout.outer, 1 if layout.columns else layout.inner, layout.runs)
    found = layout.inner if layout.columns else layout.length
    for each in strides:
        for stride, extent in zip(each, extents, strict=True):
            if extent > 1:
                found = math.gcd(found, stride)
    return math.gcd(found, 16)


def _stream_tiles(layout: Layout, shifted: bool, itemsize: int) -> tuple[int, Tiles, bool]:
    tiles = stream_tiles(
        layout.columns, layout.groups, layout.inner, layout.runs, layout.length, shifted, itemsize
    )
    return (params.COLUMNS if layout.columns else params.GROUP).value, tiles, False


def _tiles(
    layout: Layout, shifted: bool, itemsize: int, held: int, align: int
) -> tuple[int, Tiles, bool]:
    """(Spec.LAYOUT, tiles, whether a resident kernel holds them)"""
    tiles: Tiles | None
    if layout.columns:
        which = params.COLUMNS
        tiles = column_tiles(layout.runs, layout.inner, itemsize, held)
    elif layout.runs == 1:
        reach = layout.length + 3 if shifted else layout.length
        which = params.ROWS
        tiles = row_tiles(reach, layout.groups, itemsize, held, align)
    else:
        which = params.GROUP
        if layout.affine == params.PER_GROUP_ELEMENT.value:  # weights take registers as well
            held = held * 3 // 4
        tiles = group_tiles(layout.runs, layout.length, shifted, itemsize, held, align)
    if tiles is None:
        return _stream_tiles(layout, shifted, itemsize)
    return which.value, tiles, True


_plans: dict[tuple[Any, ...], Plan] = {}
_MOST_PLANS = 4096


def find_plan(
    input: Tensor, tensors: tuple[Tensor, ...], config: Config, noisy: bool, backward: bool,
    frozen: bool, fused: bool, shard: bool = False,
) -> Plan:  # fmt: skip
    """``tensors`` are all that have the input's shape, ``input`` among them; ``fused``: the main
    pass sums the gradients of a layer's weights; ``shard``: each round is a launch of its own,
    after which a kernel adds up its sums."""
    key = (
        input.shape, *(t.stride() for t in tensors), input.dtype, config.kind, config.num_groups,
        config.normalized_ndim, config.order, _series(config), config.channels_last,
        config.activation, noisy, backward, frozen, fused, shard,
    )  # fmt: skip
    found = _plans.get(key)
    if found is None:
        if len(_plans) >= _MOST_PLANS:
            _plans.clear()
        found = _make_plan(input, tensors, config, noisy, backward, frozen, fused, shard)
        _plans[key] = found
    return found


def _make_plan(
    input: Tensor, tensors: tuple[Tensor, ...], config: Config, noisy: bool, backward: bool,
    frozen: bool, fused: bool, shard: bool,
) -> Plan:  # fmt: skip
    layout = make_layout(input, config, noisy)
    strides = tuple(layout.strides(t) for t in tensors)
    dense = layout.strides(natural_like(input, layout))
    assert dense is not None
    taken = tuple(s or dense for s in strides)
    align = _align(layout, taken)
    noise_align = _align(layout, (layout.noise,))
    # Sums over groups of a weight's elements need the same elements in the same places of a tile.
    shifted = noisy and noise_align % 4 != 0 and not layout.columns and not fused
    itemsize = input.element_size()
    if shard or (frozen and not backward):
        which, tiles, resident = _stream_tiles(layout, shifted, itemsize)
    else:
        held = BACKWARD_HELD if backward else FORWARD_HELD
        which, tiles, resident = _tiles(layout, shifted, itemsize, held, align)
    together = lanes(tiles, align, itemsize)
    noise = params.NO_NOISE
    if noisy and together == 8 and noise_align % 8 == 0:
        noise = params.OCTETS
    elif noisy:
        noise = params.QUADS if noise_align % 4 == 0 or shifted else params.SCATTERED
    reach = layout.length + 3 if shifted else layout.length
    chunks = ceil_div(reach, tiles.L)
    covered = {
        params.ROWS.value: layout.length == tiles.K * tiles.L and not shifted,
        params.GROUP.value: resident
        and not shifted
        and layout.length % tiles.L == 0
        and layout.runs * chunks == tiles.K * tiles.R,
        params.COLUMNS.value: resident and layout.runs == tiles.K * tiles.R,
    }[which]
    blocks = {
        params.ROWS.value: ceil_div(layout.groups, tiles.R),
        params.GROUP.value: layout.groups,
        params.COLUMNS.value: layout.outer * ceil_div(layout.inner, tiles.L),
    }[which]
    spec = Spec(
        LAYOUT=which, R=tiles.R, L=tiles.L, K=tiles.K, EVEN=covered, SHIFTED=shifted,
        LANES=together, SPLITS=power_of_two(tiles.splits), ALIGN=align,
        WIDE=_is_wide(input, layout, taken), DOUBLE=input.dtype == torch.float64, FAST=FAST,
        SERIES=_series(config), ORDER=config.order, FROZEN=frozen, AFFINE=layout.affine,
        NOISE=noise.value, ACTIVATION=ACTIVATIONS.index(config.activation),
    )  # fmt: skip
    between = None
    if shard or (tiles.splits > REDUCED_ABOVE and layout.columns):
        between, spec = replace(spec, R=1, L=MOMENT_COLUMNS), replace(spec, SPLITS=1)
    geometry = Geometry(
        layout.groups, layout.inner, layout.runs, layout.length, chunks, *_divisor(chunks),
        *layout.noise,
    )  # fmt: skip
    return Plan(layout, strides, tiles, resident, spec, between, geometry, blocks)


def _series(config: Config) -> bool:
    """Whether exponents other than 1 are possible."""
    return config.alpha != 0.0 or config.transform_eps > 0.0


def _is_wide(input: Tensor, layout: Layout, strides: tuple[Strides, ...]) -> bool:
    """Whether offsets within a group, or positions of the noise, exceed 31 bits."""
    reach = max(s.run for s in (*strides, layout.noise)) * layout.runs
    return max(reach + layout.length, input.numel()) >= 2**31 - 2**16
