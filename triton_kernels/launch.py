"""The four ops: from tensors to a layout, a plan and launches. Argument order of ``ops.py``."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from normnorm.backends import reference
from normnorm.checks import check_backward, check_fold, check_forward
from normnorm.config import Config
from normnorm.statistics import Row, statistics_dtype

from . import folding, parameters, resident, running, streaming, table, walk
from .layout import Layout, Strides, make_layout, natural_like
from .table import Plan, ceil_div

__all__ = ["fold_running_", "normal_norm_backward", "normal_norm_forward", "normal_norm_infer"]

# Special-function instructions are spelt for NVIDIA; the interpreter and AMD take Triton's own.
FAST = torch.version.hip is None and isinstance(resident.forward, triton.runtime.JITFunction)
FOLD_ROWS, FOLD_COLUMNS = 64, 32
FOLD_MOMENTS = 8  # columns of a program
RUNNING_CHANNELS = 128


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


def _problem(
    input: Tensor, tensors: tuple[Tensor, ...], config: Config, noisy: bool, backward: bool,
    frozen: bool, fused: bool,
) -> Problem:  # fmt: skip
    """``tensors`` are all that the walk reads and writes, ``input`` among them; ``fused``: the
    main pass sums the gradients of a layer's weights."""
    key = (
        input.shape, *(t.stride() for t in tensors), input.dtype, config.kind, config.num_groups,
        config.normalized_ndim, config.order, _care(config), config.channels_last, noisy,
        backward, frozen, fused,
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
        LANES=table.lanes(plan, align, input.element_size()),
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


def _numbers(config: Config, layout: Layout) -> Numbers:
    return Numbers(
        1.0 / layout.group_size, config.eps, math.sqrt(config.eps), config.alpha,
        config.transform_eps, config.noise_train,
    )  # fmt: skip


def _stream(config: Config) -> int:
    """Counter word 2, as a signed number."""
    word = config.stream & 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def _walkable(tensor: Tensor, strides: Strides | None, layout: Layout) -> tuple[Tensor, Strides]:
    """The tensor, or a copy that the walk can take."""
    if strides is not None:
        return tensor, strides
    tensor = layout.dense(tensor)
    found = layout.strides(tensor)
    assert found is not None
    return tensor, found


def _dense_parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def _empty_like(input: Tensor, strides: Strides | None, layout: Layout) -> tuple[Tensor, Strides]:
    """An output that the walk can take; it may have to be copied into the promised strides."""
    output = torch.empty_like(input) if strides is not None else natural_like(input, layout)
    found = layout.strides(output)
    assert found is not None
    return output, found


def _promised(result: Tensor, input: Tensor) -> Tensor:
    """The result with the strides of ``empty_like(input)``."""
    wanted = torch.empty_like(input)
    return result if result.stride() == wanted.stride() else wanted.copy_(result)


def normal_norm_forward(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    noise_scale: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """``normnorm::normal_norm_forward``."""
    config = Config(*arguments)
    given = (running_mean, running_var, running_lmbda)
    check_forward(input, given, weight, bias, residual, seed, noise_scale, config)
    if input.numel() == 0:
        return reference.normal_norm_forward(
            input, *given, weight, bias, residual, seed, noise_scale, *arguments
        )
    output, stats = _forward(input, given, weight, bias, seed, noise_scale, config, True)
    assert stats is not None
    return output, stats


def normal_norm_infer(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    running_lmbda: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *arguments: Any,
) -> Tensor:
    """``normnorm::normal_norm_infer``."""
    config = Config.from_infer(*arguments)
    given = (running_mean, running_var, running_lmbda)
    check_forward(input, given, weight, bias, residual, None, None, config)
    if input.numel() == 0:
        return torch.empty_like(input)
    return _forward(input, given, weight, bias, None, None, config, False)[0]


def _forward(
    input: Tensor, given: tuple[Tensor | None, ...], weight: Tensor | None, bias: Tensor | None,
    seed: Tensor | None, noise_scale: Tensor | None, config: Config, keep: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    frozen, noisy = given[0] is not None, config.noise_train > 0.0
    output = torch.empty_like(input)
    p = _problem(input, (input, output), config, noisy, False, frozen, False)
    x, at_input = _walkable(input, p.strides[0], p.layout)
    if p.strides[1] is None:
        output = natural_like(input, p.layout)
    at_output = p.layout.strides(output)
    assert at_output is not None
    stats = None
    if keep or not (p.resident or frozen):
        dtype = statistics_dtype(input.dtype)
        stats = torch.empty(len(Row), p.layout.groups, dtype=dtype, device=input.device)
    weight, bias, noise_scale = (_dense_parameter(t) for t in (weight, bias, noise_scale))
    numbers, stream = _numbers(config, p.layout), _stream(config)
    places = (p.walk, tuple(at_input), tuple(at_output), tuple(p.layout.noise), stream)
    with _device_of(input):
        if p.resident:
            resident.forward[(p.blocks,)](
                x, output, stats, weight, bias, seed, noise_scale, *places, *numbers, p.spec,
                num_warps=p.plan.warps,
            )  # fmt: skip
        else:
            parts = _stream_statistics(x, stats, noise_scale, p, at_input, numbers, noisy, frozen)
            channels = tuple(_dense_parameter(t) for t in given)
            streaming.stream_output[(p.blocks * p.plan.splits,)](
                x, output, stats, weight, bias, seed, noise_scale, *channels, *parts, *places,
                p.plan.splits, p.parts_given, *numbers, p.spec, num_warps=p.plan.warps,
            )  # fmt: skip
    return _promised(output, input), stats


def _device_of(tensor: Tensor) -> Any:
    """Triton launches on the current device."""
    return torch.cuda.device_of(tensor)


def _stream_statistics(
    x: Tensor, stats: Tensor | None, noise_scale: Tensor | None, p: Problem, at_input: Strides,
    numbers: Numbers, noisy: bool, frozen: bool,
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """Rounds 1 to 4: the parts of lambda's sums and of the noise scale's."""
    if frozen:
        return None, None
    assert stats is not None
    splits, warps = p.plan.splits, p.plan.warps
    grid = (p.blocks * splits,)
    noise = tuple(p.layout.noise)
    part = torch.empty(10, splits, p.layout.groups, dtype=stats.dtype, device=stats.device)
    moments, lambdas, means, scales = part[:4], part[4:8], part[8:9], part[9:]
    at, given = tuple(at_input), p.parts_given
    streaming.stream_moments[grid](x, moments, p.walk, at, noise, splits, p.spec, num_warps=warps)
    if p.fold is not None:
        folded = moments.new_empty(4, p.layout.groups)
        blocks = p.layout.outer * ceil_div(p.layout.inner, FOLD_MOMENTS)
        streaming.fold_moments[(blocks,)](moments, folded, p.walk, splits, p.fold, num_warps=8)
        moments = folded
    streaming.stream_lambda[grid](
        x, stats, moments, lambdas, p.walk, at, noise, splits, given, *numbers[:2], p.spec,
        num_warps=warps,
    )  # fmt: skip
    lambdas = _folded(lambdas, p)
    if not noisy or noise_scale is not None:
        return lambdas, None
    before = None
    for sums in (means, scales):
        streaming.stream_x[grid](
            x, stats, lambdas, before, sums, p.walk, at, noise, splits, given, *numbers[:5],
            p.spec, num_warps=warps,
        )  # fmt: skip
        before = _folded(sums, p)
    return lambdas, before


def _folded(part: Tensor, p: Problem) -> Tensor:
    """Parts (k, splits, groups) as their consumers want them: added up where they are many."""
    if p.fold is None:
        return part
    count, splits, groups = part.shape
    folded = part.new_empty(count, groups)
    folding.fold_sums[(ceil_div(groups, FOLD_COLUMNS), count)](
        part, folded, splits, groups, FOLD_ROWS, FOLD_COLUMNS
    )
    return folded


def normal_norm_backward(
    grad_output: Tensor,
    input: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    seed: Tensor | None,
    needs_input: bool,
    needs_weight: bool,
    needs_bias: bool,
    frozen: bool,
    *arguments: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """``normnorm::normal_norm_backward``; a gradient not asked for is an empty tensor."""
    config = Config(*arguments)
    check_backward(
        grad_output, input, stats, weight, bias, residual, seed, needs_weight, needs_bias, config
    )
    needs = (needs_input, needs_weight, needs_bias)
    if input.numel() == 0 or not any(needs):
        return reference.normal_norm_backward(
            grad_output, input, stats, weight, bias, residual, seed, *needs, frozen, *arguments
        )
    with _device_of(input):
        return _Backward(grad_output, input, stats, weight, bias, seed, needs, frozen, config).run()


class _Backward:
    """One backward pass."""

    def __init__(
        self, grad: Tensor, input: Tensor, stats: Tensor, weight: Tensor | None,
        bias: Tensor | None, seed: Tensor | None, needs: tuple[bool, ...], frozen: bool,
        config: Config,
    ) -> None:  # fmt: skip
        self.input, self.weight, self.bias, self.seed = input, weight, bias, seed
        self.needs, self.frozen, self.config = needs, frozen, config
        # the noise reaches no other gradient
        self.noisy = config.noise_train > 0.0 and needs[1]
        fused = config.kind == "layer" and (needs[1] or needs[2])
        output = torch.empty_like(input)
        tensors = (grad, input, output)
        p = _problem(input, tensors, config, self.noisy, True, frozen, fused)
        # with sixteen warps there are no registers left for sums over all groups
        if fused and (not p.resident or p.plan.warps == table.LARGEST_WARPS):
            fused = False
            p = _problem(input, tensors, config, self.noisy, True, frozen, False)
        self.p, self.fused = p, fused
        self.grad, at_grad = _walkable(grad, p.strides[0], p.layout)
        self.x, at_input = _walkable(input, p.strides[1], p.layout)
        if p.strides[2] is None:
            output = natural_like(input, p.layout)
        self.output = output if needs[0] else None
        at_output = p.layout.strides(output)
        assert at_output is not None
        self.at = (tuple(at_grad), tuple(at_input), tuple(at_output))
        self.noise, self.stream = tuple(p.layout.noise), _stream(config)
        self.stats = stats.contiguous()
        self.dense_weight = _dense_parameter(weight)
        self.numbers = _numbers(config, p.layout)

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        wants_parameters = self.needs[1] or self.needs[2]
        within_group = walk.PER_GROUP.value != self.p.spec.AFFINE
        separate = wants_parameters and within_group and not self.fused
        gradients: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.p.resident:
            if self.needs[0] or not separate:
                gradients = self._resident(wants_parameters and not separate)
        else:
            gradients = self._streaming(wants_parameters and not separate)
        if separate:
            gradients = self._parameters()
        grad_input = self.input.new_empty(0)
        if self.output is not None:
            grad_input = _promised(self.output, self.input)
        nothing = self.input.new_empty(0)
        return (
            grad_input,
            nothing if gradients[0] is None else gradients[0],
            nothing if gradients[1] is None else gradients[1],
        )

    @property
    def _scalars(self) -> tuple[float, ...]:
        n = self.numbers
        return n.inverse_count, n.alpha, n.transform_eps, n.noise_train

    def _parts(self, rows: int, columns: int) -> list[Tensor | None]:
        """Room for the parts of the weight's and the bias's gradient, where wanted."""
        shape = (rows, columns)
        return [
            torch.empty(shape, dtype=self.stats.dtype, device=self.stats.device) if needed else None
            for needed in self.needs[1:]
        ]

    def _fold(self, parts: list[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """The parameters' gradients from their parts (rows, elements)."""
        outputs = [
            None if part is None or like is None else torch.empty_like(
                like, memory_format=torch.contiguous_format
            )
            for part, like in zip(parts, (self.weight, self.bias), strict=True)
        ]  # fmt: skip
        shapes = [part.shape for part in parts if part is not None]
        rows, columns = shapes[0]
        folding.fold_parts[(ceil_div(columns, FOLD_COLUMNS), 2)](
            parts[0], parts[1], outputs[0], outputs[1], rows, columns,
            min(FOLD_ROWS, table.power_of_two(rows)), FOLD_COLUMNS,
        )  # fmt: skip
        return outputs[0], outputs[1]

    def _resident(self, parts_wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        p = self.p
        programs, which = p.blocks, 0
        parts: list[Tensor | None] = [None, None]
        if parts_wanted and self.fused:
            which, programs = 2, table.persistent_programs(p.blocks, p.plan.warps)
            parts = self._parts(programs, p.layout.length)
        elif parts_wanted:
            which, parts = 1, self._parts(p.layout.outer, p.layout.inner)
        resident.backward[(programs,)](
            self.grad, self.x, self.stats, self.dense_weight, self.seed, self.output, *parts,
            p.walk, *self.at, self.noise, self.stream, p.blocks, *self._scalars, which, p.spec,
            num_warps=p.plan.warps,
        )  # fmt: skip
        return self._fold(parts) if parts_wanted else (None, None)

    def _streaming(self, parts_wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        p, splits = self.p, self.p.plan.splits
        shape = (7, splits, p.layout.groups)
        part = torch.empty(shape, dtype=self.stats.dtype, device=self.stats.device)
        asked = [needed and parts_wanted for needed in self.needs[1:]]

        def gradient(output: Tensor | None, sums: Tensor | None, to: Tensor | None) -> None:
            streaming.stream_gradient[(p.blocks * splits,)](
                self.grad, self.x, self.stats, self.dense_weight, self.seed, output, sums, to,
                p.walk, *self.at, self.noise, self.stream, splits, p.parts_given, *self._scalars,
                *asked, p.spec, num_warps=p.plan.warps,
            )  # fmt: skip

        if self.frozen:  # no gradient passes through the statistics: one pass does it all
            gradient(self.output, None, part if any(asked) else None)
        else:
            if self.output is not None or any(asked):
                gradient(None, None, part)
            if self.output is not None:
                gradient(self.output, _folded(part[:5], p), None)
        if not any(asked):
            return None, None
        rows = splits * p.layout.outer
        return self._fold(
            [
                part[5 + i].view(rows, p.layout.inner) if wanted else None
                for i, wanted in enumerate(asked)
            ]
        )

    def _parameters(self) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of weights that vary within a group, in a pass of their own."""
        p, layout = self.p, self.p.layout
        per_run = layout.affine == walk.PER_RUN.value
        row_runs = 1 if per_run else layout.runs
        rows = layout.outer * row_runs
        plan = table.parameter_plan(rows, layout.length, self.input.element_size())
        elements = layout.inner * (layout.runs if per_run else layout.length)
        programs = layout.inner * (layout.runs if per_run else ceil_div(layout.length, plan.L))
        in_quads = walk.QUADS.value == p.spec.NOISE and not p.spec.SHIFTED and plan.L % 4 == 0
        noise = walk.NO_NOISE.value
        if self.noisy:
            noise = (walk.QUADS if in_quads else walk.SCATTERED).value
        spec = walk.Spec(
            WALK=walk.ROWS.value, R=plan.R, L=plan.L, AFFINE=layout.affine, NOISE=noise,
            ORDER=self.config.order, CARE=p.spec.CARE, FROZEN=self.frozen, WIDE=p.spec.WIDE,
            ALIGN=p.spec.ALIGN, FAST=FAST, DOUBLE=p.spec.DOUBLE,
        )  # fmt: skip
        parts = self._parts(plan.splits, elements)
        parameters.parameter_sums[(programs * plan.splits,)](
            self.grad, self.x, self.stats, self.seed, *parts, p.walk, *self.at[:2], self.noise,
            rows, row_runs, self.stream, plan.splits, self.numbers.transform_eps,
            self.numbers.noise_train, spec, num_warps=plan.warps,
        )  # fmt: skip
        return self._fold(parts)


def fold_running_(
    stats: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_lmbda: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    eps: float,
    backend: str,
) -> None:
    """``normnorm::fold_running_``: moves the running statistics towards a batch's, in place."""
    check_fold(
        stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps
    )
    channels = running_mean.size(0)
    cumulative = momentum is None
    if cumulative and num_batches_tracked is not None:
        num_batches_tracked.add_(1)  # before every program reads it
    strides = tuple(t.stride(0) for t in (running_mean, running_var, running_lmbda))
    with _device_of(stats):
        running.fold_running[(ceil_div(channels, RUNNING_CHANNELS),)](
            stats, running_mean, running_var, running_lmbda, num_batches_tracked, strides,
            stats.stride(), channels, stats.size(1) // channels,
            0.0 if momentum is None else momentum, count / (count - 1), eps,
            CUMULATIVE=cumulative, L=RUNNING_CHANNELS,
        )  # fmt: skip
