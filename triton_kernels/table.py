"""Which tile, how many warps and programs serve a group: a table by shape.

Nothing is tuned by timing: equal shapes give equal kernels and equal bits, on every device.

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
from typing import NamedTuple

__all__ = ["Plan", "column_plan", "group_plan", "parameter_plan", "row_plan", "stream_plan"]

# Elements of a group that a thread holds: one number each forward, three backward.
FORWARD_HELD, BACKWARD_HELD = 32, 16
LARGEST_WARPS = 16
LARGEST_K = 8
# Programs that do the work of many: enough warps for the registers of 132 multiprocessors. A
# constant, so that the order of the sums does not depend on the device.
PERSISTENT_WARPS = 2112
STREAM_WARPS = 4
LARGEST_SPLITS = 64
# Columns with few tiles need many programs a tile, and a kernel of its own to add up their parts.
LARGEST_COLUMN_SPLITS = 512
FOLDED_ABOVE = 16


class Plan(NamedTuple):
    """R x L elements a tile, K tiles a group, warps a program; programs a group (streaming)."""

    R: int
    L: int
    K: int
    warps: int
    splits: int = 1


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def _held(held: int, itemsize: int, align: int = 16) -> int:
    """Elements that do not spill: addresses that nothing is known of take registers too."""
    if itemsize == 8:
        return held // 4
    return held if align >= 4 else held // 2


def lanes(plan: Plan, align: int, itemsize: int) -> int:
    """Neighbouring elements of a row that a thread holds, if it holds any: a vector, as far as
    alignment and the tile's size go."""
    each = max(1, plan.R * plan.L // (32 * plan.warps))
    return min(16 // itemsize, each, math.gcd(align, 16), plan.L)


def _vector(itemsize: int) -> int:
    """Elements of a 128-bit access, or of a Philox counter where those are more."""
    return max(16 // itemsize, 4)


def row_plan(length: int, groups: int, itemsize: int, held: int, align: int = 16) -> Plan | None:
    """A group is one run, in K tiles of L; R groups a program."""
    held, vector = _held(held, itemsize, align), _vector(itemsize)
    best: tuple[float, Plan] | None = None
    for log in range(4, max(5, power_of_two(length).bit_length())):
        L = 1 << log
        K = ceil_div(length, L)
        if K > LARGEST_K:
            continue
        for warps in (1, 2, 4, 8, LARGEST_WARPS)[: 5 if align >= 4 else 4]:
            for narrow in range(3):  # fewer elements a thread and tile than a whole vector
                each = vector >> narrow
                R = each * 32 * warps // L  # several short groups a program only within a warp
                if R > 1 and warps > 1:
                    continue
                # the backward pass keeps more of each group
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
                    best = (cost, Plan(R, L, K, warps))
    return best[1] if best else None


def chunk_length(length: int, shifted: bool, tile: int) -> int:
    """The chunk that a run is cut into: the largest of those that waste least."""
    reach = length + 3 if shifted else length
    candidates = [1 << log for log in range(3, tile.bit_length()) if 1 << log <= max(tile, 8)]
    wasted = {L: ceil_div(reach, L) * L for L in candidates}
    least = min(wasted.values())
    return max(L for L in candidates if wasted[L] <= 1.06 * least)


def group_plan(
    runs: int, length: int, shifted: bool, itemsize: int, held: int, align: int = 16
) -> Plan | None:
    """A group is several runs, in K tiles of R chunks."""
    held, vector = _held(held, itemsize, align), _vector(itemsize)
    for warps in (4, 8, LARGEST_WARPS)[: 3 if align >= 4 else 2]:
        tile = 32 * warps * vector
        L = chunk_length(length, shifted, tile)
        chunks = runs * ceil_div(length + (3 if shifted else 0), L)
        R = min(tile // L, power_of_two(chunks))
        K = ceil_div(chunks, R)
        if K <= LARGEST_K and held * 32 * warps >= K * R * L:
            return Plan(R, L, K, warps)
    return None


def column_plan(rows: int, columns: int, itemsize: int, held: int) -> Plan | None:
    """A group is a column, in K tiles of R rows."""
    # Every number of a group is one of each column of a thread: four columns, not a whole vector.
    held, vector = _held(min(held, 24), itemsize), 4
    L = min(32, max(4, power_of_two(columns)))
    for warps in (4, 8, LARGEST_WARPS):
        R = min(32 * warps * vector // L, power_of_two(rows))
        K = ceil_div(rows, R)
        if K <= LARGEST_K and held * 32 * warps >= K * R * L:
            return Plan(R, L, K, warps)
    return None


def stream_plan(
    columns: bool, groups: int, inner: int, runs: int, length: int, shifted: bool, itemsize: int
) -> Plan:
    """Tiles of one vector a thread; so many programs a group that the device is full."""
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
    return Plan(R, L, 1, STREAM_WARPS, max(1, min(splits, ceil_div(tiles, 4), most)))


def persistent_programs(blocks: int, warps: int) -> int:
    """Programs that share out ``blocks`` pieces of work and keep sums over them."""
    return max(1, min(blocks, PERSISTENT_WARPS // warps))


def parameter_plan(rows: int, length: int, itemsize: int) -> Plan:
    """Tiles of the pass that sums the gradients of weights that vary within a group; its
    programs share out the rows."""
    tile = 32 * STREAM_WARPS * _vector(itemsize)
    L = min(128, max(8, power_of_two(length)))
    R = min(tile // L, power_of_two(rows))
    columns = ceil_div(length, L)
    splits = ceil_div(PERSISTENT_WARPS // STREAM_WARPS, columns)
    return Plan(R, L, 1, STREAM_WARPS, max(1, min(splits, ceil_div(rows, R), 256)))
