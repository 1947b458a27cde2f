"""What one pass works on: from tensors and a configuration to a layout, a plan and a kernel's
specification. Remembered by shapes, strides, dtypes and configuration."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from normnorm.config import Config

from . import folding, resident, table, walk
from .layout import Layout, Strides, make_layout, natural_like
from .table import Plan, ceil_div

# Special-function instructions are spelt for NVIDIA; the interpreter and AMD take Triton's own.
FAST = torch.version.hip is None and isinstance(resident.forward, triton.runtime.JITFunction)
FOLD_MOMENTS = 8  # columns of a program


class Operand(NamedTuple):
    """A tensor and its strides in the walk, as kernels take them; None where there is none."""

    tensor: Tensor | None
    at: tuple[int, ...] | None


ABSENT = Operand(None, None)


class Numbers(NamedTuple):
    """The scalar arguments, in the order in which kernels take them."""

    inverse_count: float
    eps: float
    root_eps: float
    alpha: float
    transform_eps: float
    noise_train: float


@dataclass(frozen=True)
class Problem:
    """What one pass works on, fixed by shapes, strides, dtypes and configuration.

    Attributes:
        layout: how the groups lie.
        strides: of the tensors in the walk, in the order given; None where one has to be copied.
        plan: tiles, warps and programs.
        resident: whether the plan is that of a resident kernel.
        spec: what the kernels are compiled for.
        fold: the same for the kernel that adds up the parts of many programs; None where
            whichever comes next does it by itself.
        walk: the geometry, as kernels take it.
        blocks: pieces of work: groups, or as many as a tile has rows or columns.
    """

    layout: Layout
    strides: tuple[Strides | None, ...]
    plan: Plan
    resident: bool
    spec: walk.Spec
    fold: walk.Spec | None
    walk: tuple[int, ...]
    blocks: int

    @property
    def parts_given(self) -> int:
        """How many parts of a group its consumers find."""
        return self.plan.splits if self.fold is None else 1

    @property
    def noise(self) -> tuple[int, ...]:
        return tuple(self.layout.noise)

    def folded(self, part: Tensor) -> Tensor:
        """Parts (k, splits, groups) as their consumers want them: added up where they are many."""
        if self.fold is None:
            return part
        count, splits, groups = part.shape
        sums = part.new_empty(count, groups)
        folding.fold_sums[(ceil_div(groups, folding.COLUMNS), count)](
            part, sums, splits, groups, folding.ROWS, folding.COLUMNS
        )
        return sums

    def read(self, tensor: Tensor, number: int) -> Operand:
        """Tensor ``number`` of those in ``strides``, or a copy that the walk can take."""
        at = self.strides[number]
        if at is None:
            tensor = self.layout.dense(tensor)
            at = self.layout.strides(tensor)
            assert at is not None
        return Operand(tensor, tuple(at))

    def written(self, output: Tensor, number: int) -> Operand:
        """An output with the strides promised, or one that the walk can take, to be copied into
        those by :func:`promised`."""
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


def _plan(
    layout: Layout, shifted: bool, itemsize: int, held: int, align: int
) -> tuple[int, Plan, bool]:
    """(walk, plan, whether it is resident)"""
    resident: Plan | None
    if layout.columns:
        which = walk.COLUMNS
        resident = table.column_plan(layout.runs, layout.inner, itemsize, held)
    elif layout.runs == 1:
        reach = layout.length + 3 if shifted else layout.length
        which = walk.ROWS
        resident = table.row_plan(reach, layout.groups, itemsize, held, align)
    else:
        which = walk.GROUP
        if layout.affine == walk.PER_GROUP_ELEMENT.value:  # weights take registers as well
            held = held * 3 // 4
        resident = table.group_plan(layout.runs, layout.length, shifted, itemsize, held, align)
    if resident is not None:
        return which.value, resident, True
    streamed = table.stream_plan(
        layout.columns, layout.groups, layout.inner, layout.runs, layout.length, shifted, itemsize
    )
    return (walk.COLUMNS if layout.columns else walk.GROUP).value, streamed, False


_problems: dict[tuple[Any, ...], Problem] = {}
_MOST_PROBLEMS = 4096  # more than that many shapes are not worth remembering


def find_problem(
    input: Tensor, tensors: tuple[Tensor, ...], config: Config, noisy: bool, backward: bool,
    frozen: bool, fused: bool,
) -> Problem:  # fmt: skip
    """``tensors`` are all that the walk reads and writes, each with strides of its own, ``input``
    among them; ``fused``: the main pass sums the gradients of a layer's weights."""
    key = (
        input.shape, *(t.stride() for t in tensors), input.dtype, config.kind, config.num_groups,
        config.normalized_ndim, config.order, _care(config), config.channels_last,
        config.activation, noisy, backward, frozen, fused,
    )  # fmt: skip
    found = _problems.get(key)
    if found is None:
        if len(_problems) >= _MOST_PROBLEMS:
            _problems.clear()
        found = _make_problem(input, tensors, config, noisy, backward, frozen, fused)
        _problems[key] = found
    return found


def _make_problem(
    input: Tensor, tensors: tuple[Tensor, ...], config: Config, noisy: bool, backward: bool,
    frozen: bool, fused: bool,
) -> Problem:  # fmt: skip
    layout = make_layout(input, torch.empty_like(input), config, noisy)
    strides = tuple(layout.strides(t) for t in tensors)
    dense = layout.strides(natural_like(input, layout))
    assert dense is not None
    taken = tuple(s or dense for s in strides)
    align = _align(layout, taken)
    in_quads = _align(layout, (layout.noise,)) % 4 == 0
    # Sums over groups of a weight's elements want the same elements in the same places of a tile.
    shifted = noisy and not in_quads and not layout.columns and not fused
    held = table.BACKWARD_HELD if backward else table.FORWARD_HELD
    which, plan, resident = _plan(layout, shifted, input.element_size(), held, align)
    if frozen and resident and not backward:
        resident = False
        which = (walk.COLUMNS if layout.columns else walk.GROUP).value
        plan = table.stream_plan(
            layout.columns, layout.groups, layout.inner, layout.runs, layout.length, shifted,
            input.element_size(),
        )  # fmt: skip
    noise = walk.NO_NOISE.value
    if noisy:
        noise = (walk.QUADS if in_quads or shifted else walk.SCATTERED).value
    reach = layout.length + 3 if shifted else layout.length
    chunks = ceil_div(reach, plan.L)
    covered = {
        walk.ROWS.value: layout.length == plan.K * plan.L and not shifted,
        walk.GROUP.value: resident
        and not shifted
        and layout.length % plan.L == 0
        and layout.runs * chunks == plan.K * plan.R,
        walk.COLUMNS.value: resident and layout.runs == plan.K * plan.R,
    }[which]
    blocks = {
        walk.ROWS.value: ceil_div(layout.groups, plan.R),
        walk.GROUP.value: layout.groups,
        walk.COLUMNS.value: layout.outer * ceil_div(layout.inner, plan.L),
    }[which]
    spec = walk.Spec(
        WALK=which, R=plan.R, L=plan.L, K=plan.K, AFFINE=layout.affine, NOISE=noise,
        ORDER=config.order, CARE=_care(config), FROZEN=frozen, EVEN=covered, SHIFTED=shifted,
        WIDE=_is_wide(input, layout, taken), ALIGN=align, FAST=FAST,
        DOUBLE=input.dtype == torch.float64, SPLITS=table.power_of_two(plan.splits),
        LANES=table.lanes(plan, align, input.element_size()), RELU=config.activation == "relu",
    )  # fmt: skip
    fold = None
    if plan.splits > table.FOLDED_ABOVE and layout.columns:
        fold, spec = replace(spec, R=1, L=FOLD_MOMENTS), replace(spec, SPLITS=1)
    geometry = (layout.groups, layout.inner, layout.runs, layout.length, chunks, *_divisor(chunks))
    return Problem(layout, strides, plan, resident, spec, fold, geometry, blocks)


def _care(config: Config) -> bool:
    """Whether exponents other than 1 can come up."""
    return config.alpha != 0.0 or config.transform_eps > 0.0


def _is_wide(input: Tensor, layout: Layout, strides: tuple[Strides | None, ...]) -> bool:
    """Whether offsets within a group, or positions of the noise, leave 31 bits."""
    reach = max(s.run for s in (*strides, layout.noise) if s is not None) * layout.runs
    return max(reach + layout.length, input.numel()) >= 2**31 - 2**16


def make_numbers(config: Config, layout: Layout) -> Numbers:
    return Numbers(
        1.0 / layout.group_size, config.eps, math.sqrt(config.eps), config.alpha,
        config.transform_eps, config.noise_train,
    )  # fmt: skip


def stream_word(config: Config) -> int:
    """Counter word 2, as a signed number."""
    word = config.stream & 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def dense_parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def promised(output: Operand, input: Tensor) -> Tensor:
    """The output with the strides of ``empty_like(input)``."""
    result, wanted = output.tensor, torch.empty_like(input)
    assert result is not None
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(tensor)
