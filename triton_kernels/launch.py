"""The ops, with the argument order of ``normnorm/ops.py``, and the launches of their passes: one
launch if a program keeps a group in registers, else one per round (a pass over the groups)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..backends import reference
from ..checks import check_backward, check_fold, check_forward
from ..config import BackwardArguments, Config, ForwardArguments
from ..statistics import Round, Row, statistics_dtype
from . import params, reduce, resident, streaming
from . import plan as planning
from .params import (
    ABSENT,
    Affine,
    BackwardTensors,
    ForwardTensors,
    Noise,
    Operand,
    Running,
    Splits,
    make_numbers,
)
from .plan import MOMENT_COLUMNS, Plan, ceil_div, find_plan

__all__ = ["fold_running_", "normal_norm_backward", "normal_norm_forward", "run_round"]


def normal_norm_forward(*arguments: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """``normnorm::normal_norm_forward``."""
    call = ForwardArguments.of(*arguments)
    check_forward(call)
    if call.input.numel() == 0:
        return reference.normal_norm_forward(*arguments)
    return run_forward(call)


def normal_norm_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """``normnorm::normal_norm_backward``; a gradient that was not requested is an empty tensor."""
    call = BackwardArguments.of(*arguments)
    check_backward(call)
    if call.input.numel() == 0 or not (call.needs_input or call.needs_weight or call.needs_bias):
        return reference.normal_norm_backward(*arguments)
    return Backward(call).run()


def fold_running_(
    stats: Tensor,
    running_mean: Tensor,
    running_var: Tensor,
    running_lmbda: Tensor,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    count: int,
    eps: float,
) -> None:
    """``normnorm::fold_running_``: moves the running statistics towards a batch's, in place."""
    check_fold(
        stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps
    )
    channels = running_mean.size(0)
    cumulative = momentum is None
    if cumulative and num_batches_tracked is not None:
        num_batches_tracked.add_(1)  # before every program reads it
    buffers = Running(running_mean, running_var, running_lmbda)
    strides = Running(running_mean.stride(0), running_var.stride(0), running_lmbda.stride(0))
    with torch.cuda.device_of(stats):
        reduce.fold_running[(ceil_div(channels, reduce.RUNNING_CHANNELS),)](
            stats, buffers, num_batches_tracked, strides, stats.stride(), channels,
            stats.size(1) // channels, 0.0 if momentum is None else momentum, count / (count - 1),
            eps, CUMULATIVE=cumulative, L=reduce.RUNNING_CHANNELS,
        )  # fmt: skip


# --- the forward pass ----------------------------------------------------------------------------


def run_forward(call: ForwardArguments) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Launches the forward pass: (output, statistics, sum)."""
    input, residual, adds, config = call.input, call.residual, call.prenorm, call.config
    given, noise_scale = call[1:4], call.noise_scale
    frozen, noisy = given[0] is not None, config.noise_train > 0.0
    output = torch.empty_like(input)
    tensors = (input, output) if residual is None else (input, output, residual)
    p = find_plan(input, tensors, config, noisy, False, frozen, False)
    t = ForwardTensors(
        p.read(input, 0), p.written(output, 1),
        ABSENT if residual is None else p.read(residual, 2),
        p.written(torch.empty_like(input), 1) if adds else ABSENT,
    )  # fmt: skip
    stats = None
    if call.keep_stats or not (p.resident or frozen):  # a later launch reads them
        dtype = statistics_dtype(input.dtype)
        stats = torch.empty(len(Row), p.layout.groups, dtype=dtype, device=input.device)
    affine = Affine(dense_parameter(call.weight), dense_parameter(call.bias))
    noise = Noise(call.seed, dense_parameter(noise_scale), stream_word(config))
    numbers = make_numbers(config, p.layout.group_size)
    with torch.cuda.device_of(input):
        if p.resident:
            resident.forward[(p.blocks,)](
                t, stats, affine, noise, p.geometry, *numbers, p.spec, num_warps=p.tiles.warps
            )
        else:
            sums: tuple[Tensor | None, Tensor | None] = (None, None)
            x = t
            if not frozen:
                assert stats is not None
                part = stats.new_empty(10, p.tiles.splits, p.layout.groups)
                moments = _moments(t, part[:4], p)
                if adds:
                    x = t._replace(input=t.sum, residual=ABSENT)
                scales = noisy and noise_scale is None
                sums = _statistics(x.input, stats, moments, part[4:], p, numbers, scales)
            running = Running(*(dense_parameter(g) for g in given))
            streaming.stream_output[(p.blocks * p.tiles.splits,)](
                x._replace(sum=ABSENT), stats, affine, noise, running, *sums, p.geometry,
                Splits(p.tiles.splits, p.left), *numbers, p.spec, num_warps=p.tiles.warps,
            )  # fmt: skip
    return promised(t.output, input), stats, promised(t.sum, input) if adds else None


def _moments(t: ForwardTensors, part: Tensor, p: Plan) -> Tensor:
    """Round 1: partial moments (4, splits, groups), added up to (4, groups) if there are many."""
    splits = p.tiles.splits
    residual = ABSENT if t.sum.data is None else t.residual
    streaming.stream_moments[(p.blocks * splits,)](
        t._replace(output=ABSENT, residual=residual), part, p.geometry, splits, p.spec,
        num_warps=p.tiles.warps,
    )  # fmt: skip
    if p.reduce_moments is None:
        return part
    moments = part.new_empty(4, p.layout.groups)
    blocks = p.blocks
    if p.layout.columns:
        blocks = p.layout.outer * ceil_div(p.layout.inner, MOMENT_COLUMNS)
    reduce.reduce_moments[(blocks,)](
        part, moments, p.geometry, splits, p.reduce_moments, num_warps=8
    )
    return moments


def _statistics(
    x: Operand, stats: Tensor, moments: Tensor, part: Tensor, p: Plan, numbers: params.Numbers,
    scales: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Rounds 2 to 4: the partial sums of lambda and, if ``scales``, those of the noise scales."""
    grid, splits = (p.blocks * p.tiles.splits,), Splits(p.tiles.splits, p.left)
    lambdas, means, deviations = part[:4], part[4:5], part[5:]
    streaming.stream_lambda[grid](
        x, stats, moments, lambdas, p.geometry, splits, *numbers, p.spec, num_warps=p.tiles.warps
    )
    lambdas = _reduced(lambdas, p)
    if not scales:
        return lambdas, None
    before = None
    for sums in (means, deviations):
        streaming.stream_x[grid](
            x, stats, lambdas, before, sums, p.geometry, splits, *numbers, p.spec,
            num_warps=p.tiles.warps,
        )  # fmt: skip
        before = _reduced(sums, p)
    return lambdas, before


def _reduced(part: Tensor, p: Plan, sums: Tensor | None = None) -> Tensor:
    """Partial sums (k, splits, groups) for the next kernel, added up if there are many, into
    ``sums`` if given."""
    if p.reduce_moments is None:
        return part
    count, splits, groups = part.shape
    if sums is None:
        sums = part.new_empty(count, groups)
    reduce.reduce_sums[(ceil_div(groups, reduce.COLUMNS_OF_SUMS), count)](
        part, sums, splits, groups, reduce.ROWS, reduce.COLUMNS_OF_SUMS
    )
    return sums


# --- the backward pass ---------------------------------------------------------------------------


class Backward:
    """One backward pass: plans it in ``__init__``, launches it in :meth:`run`."""

    def __init__(self, call: BackwardArguments) -> None:
        grad, input, config, frozen = call.grad_output, call.input, call.config, call.frozen
        result, grad_sum = call.output, call.grad_sum
        needs = (call.needs_input, call.needs_weight, call.needs_bias)
        self.input, self.weight, self.bias = input, call.weight, call.bias
        self.needs, self.frozen = needs, frozen
        # only the weight's gradient depends on the noise
        self.noisy = config.noise_train > 0.0 and needs[1]
        fused = config.kind == "layer" and (needs[1] or needs[2])
        output = torch.empty_like(input)
        optional = (result, grad_sum if needs[0] else None)
        tensors = (grad, input, output, *(t for t in optional if t is not None))
        p = find_plan(input, tensors, config, self.noisy, True, frozen, fused)
        # a program of LARGEST_WARPS warps has no registers left for sums over all groups
        if fused and (not p.resident or p.tiles.warps == planning.LARGEST_WARPS):
            fused = False
            p = find_plan(input, tensors, config, self.noisy, True, frozen, False)
        self.p, self.fused = p, fused
        self.output = p.written(output, 2)
        adds = None if grad_sum is None or not needs[0] else p.read(grad_sum, len(tensors) - 1)
        self.tensors = BackwardTensors(
            p.read(grad, 0), p.read(input, 1), self.output if needs[0] else ABSENT,
            ABSENT if result is None else p.read(result, 3),
            adds or ABSENT,
        )  # fmt: skip
        self.noise = Noise(call.seed, None, stream_word(config))
        self.stats = call.stats.contiguous()
        self.dense_weight = dense_parameter(call.weight)
        self.numbers = make_numbers(config, p.layout.group_size)

    def run(self) -> tuple[Tensor, ...]:
        with torch.cuda.device_of(self.input):
            return self._run()

    def _run(self) -> tuple[Tensor, ...]:
        wants_parameters = self.needs[1] or self.needs[2]
        within_group = params.PER_GROUP.value != self.p.spec.AFFINE
        separate = wants_parameters and within_group and not self.fused
        gradients = Affine(None, None)
        if self.p.resident:
            if self.needs[0] or not separate:
                gradients = self._resident(wants_parameters and not separate)
        else:
            gradients = self._streaming(wants_parameters and not separate)
        if separate:
            gradients = self._parameters()
        nothing = self.input.new_empty(0)
        return (
            promised(self.output, self.input) if self.needs[0] else nothing,
            nothing if gradients.weight is None else gradients.weight,
            nothing if gradients.bias is None else gradients.bias,
        )

    def _parts(self, rows: int, columns: int) -> Affine:
        """Workspace (rows, columns) for the partial sums of each needed parameter gradient."""
        return Affine(
            *(self.stats.new_empty(rows, columns) if needed else None for needed in self.needs[1:])
        )

    def _reduce(self, parts: Affine) -> Affine:
        """The parameters' gradients from their partial sums (rows, elements)."""
        outputs = [
            None if part is None or like is None else torch.empty_like(
                like, memory_format=torch.contiguous_format
            )
            for part, like in zip(parts, (self.weight, self.bias), strict=True)
        ]  # fmt: skip
        rows, columns = next(part.shape for part in parts if part is not None)
        reduce.reduce_parameters[(ceil_div(columns, reduce.COLUMNS_OF_SUMS), 2)](
            parts, Affine(*outputs), rows, columns,
            min(reduce.ROWS, planning.power_of_two(rows)), reduce.COLUMNS_OF_SUMS,
        )  # fmt: skip
        return Affine(*outputs)

    def _resident(self, parts_wanted: bool) -> Affine:
        p = self.p
        programs, which = p.blocks, 0
        parts = Affine(None, None)
        if parts_wanted and self.fused:
            which, programs = 2, planning.persistent_programs(p.blocks, p.tiles.warps)
            parts = self._parts(programs, p.layout.length)
        elif parts_wanted:
            which, parts = 1, self._parts(p.layout.outer, p.layout.inner)
        resident.backward[(programs,)](
            self.tensors, self.stats, self.dense_weight, self.noise, parts, p.geometry, p.blocks,
            *self.numbers, which, p.spec, num_warps=p.tiles.warps,
        )  # fmt: skip
        return self._reduce(parts) if parts_wanted else parts

    def _streaming(self, parts_wanted: bool) -> Affine:
        p, splits = self.p, self.p.tiles.splits
        part = self.stats.new_empty(7, splits, p.layout.groups)
        asked = [needed and parts_wanted for needed in self.needs[1:]]
        tensors, reads = self.tensors, self.tensors._replace(output=ABSENT, grad_sum=ABSENT)

        def gradient(t: BackwardTensors, sums: Tensor | None, to: Tensor | None) -> None:
            streaming.stream_gradient[(p.blocks * splits,)](
                t, self.stats, self.dense_weight, self.noise, sums, to, p.geometry,
                Splits(splits, p.left), *self.numbers, *asked, p.spec, num_warps=p.tiles.warps,
            )  # fmt: skip

        if self.frozen:  # no gradient passes through the statistics: one launch
            gradient(tensors, None, part if any(asked) else None)
        else:
            if self.needs[0] or any(asked):
                gradient(reads, None, part)
            if self.needs[0]:
                gradient(tensors, _reduced(part[:5], p), None)
        if not any(asked):
            return Affine(None, None)
        rows = splits * p.layout.outer
        return self._reduce(
            Affine(
                *(
                    part[6 - i].view(rows, p.layout.inner) if wanted else None
                    for i, wanted in enumerate(asked)
                )
            )
        )

    def _parameters(self) -> Affine:
        """The gradients of parameters that vary within a group, by a separate launch."""
        p, layout = self.p, self.p.layout
        per_run = layout.affine == params.PER_RUN.value
        row_runs = 1 if per_run else layout.runs
        rows = layout.outer * row_runs
        tiles = planning.parameter_tiles(rows, layout.length, self.input.element_size())
        elements = layout.inner * (layout.runs if per_run else layout.length)
        programs = layout.inner * (layout.runs if per_run else ceil_div(layout.length, tiles.L))
        noise = params.SCATTERED.value if p.spec.SHIFTED else p.spec.NOISE
        spec = replace(
            p.spec, LAYOUT=params.ROWS.value, R=tiles.R, L=tiles.L, K=1, EVEN=False,
            SHIFTED=False, LANES=1, SPLITS=1, NOISE=noise,
        )  # fmt: skip
        parts = self._parts(tiles.splits, elements)
        streaming.parameter_sums[(programs * tiles.splits,)](
            self.tensors._replace(output=ABSENT, grad_sum=ABSENT), self.stats, self.noise, parts,
            p.geometry, rows, row_runs, tiles.splits, self.numbers.transform_eps,
            self.numbers.noise_train, spec, num_warps=tiles.warps,
        )  # fmt: skip
        return self._reduce(parts)


# --- one round over a shard ----------------------------------------------------------------------


def run_round(
    input: Tensor, stats: Tensor, sums: Any, result: Any, weight: Tensor | None,
    bias: Tensor | None, residual: Tensor | None, seed: Tensor | None, grad_output: Tensor | None,
    output: Tensor | None, config: Config, number: Round,
) -> None:  # fmt: skip
    """One round of a pass over a shard: the arguments and the meaning of the compiled kernels'
    ``round_``, with sums or a result of None where the round has none. Only the round that writes
    the result uses it."""
    writes = number in (Round.OUTPUT, Round.GRADIENT)
    if input.numel() == 0:
        if not writes:
            sums.zero_()
        return
    given = {
        "input": input, "grad": grad_output, "result": output,
        "residual": residual if number == Round.OUTPUT else None,
        "output": result if writes else None,
    }  # fmt: skip
    tensors = {name: tensor for name, tensor in given.items() if tensor is not None}
    backward = grad_output is not None
    noisy = config.noise_train > 0.0 and number in (Round.OUTPUT, Round.SUMS)
    p = find_plan(input, (*tensors.values(),), config, noisy, backward, False, False, shard=True)
    operands = {
        name: (p.written if name == "output" else p.read)(tensor, i)
        for i, (name, tensor) in enumerate(tensors.items())
    }
    t: Any = (BackwardTensors if backward else ForwardTensors)(**operands)
    noise = Noise(seed, stats[Row.NOISE_SCALE], stream_word(config))
    affine = Affine(dense_parameter(weight), dense_parameter(bias))
    # the means that a kernel takes have been divided by the count of the whole batch
    numbers, splits = make_numbers(config, 1), p.tiles.splits

    def launch(kernel: Any, *arguments: Any, flags: tuple[bool, ...] = ()) -> None:
        kernel[(p.blocks * splits,)](
            *arguments, p.geometry, Splits(splits, p.left), *numbers, *flags, p.spec,
            num_warps=p.tiles.warps,
        )  # fmt: skip

    with torch.cuda.device_of(input):
        if number == Round.OUTPUT:
            running = Running(None, None, None)
            launch(streaming.stream_output, t, stats, affine, noise, running, None, None)
        elif number == Round.GRADIENT:
            means, flags = sums.to(stats.dtype), (False, False)
            launch(
                streaming.stream_gradient, t, stats, affine.weight, noise, means, None, flags=flags
            )
        if writes:
            if t.output.data is not result:
                result.copy_(t.output.data)
            return
        rows = 4 if number == Round.MOMENTS else sums.size(0)
        part = stats.new_empty(rows, splits, p.layout.groups)
        if number == Round.MOMENTS:
            sums.copy_(_moments(t, part, p)[1:])
            return
        if number == Round.LMBDA:
            launch(streaming.stream_lambda, t.input, stats, None, part)
        elif number == Round.SUMS:
            flags = (True, True)
            launch(
                streaming.stream_gradient, t, stats, affine.weight, noise, None, part, flags=flags
            )
        else:
            mean = stats[Row.NOISE_SCALE] if number == Round.DEVIATION else None
            launch(streaming.stream_x, t.input, stats, None, mean, part)
        _reduced(part, p, sums)


# --- arguments and results -----------------------------------------------------------------------


def stream_word(config: Config) -> int:
    """Counter word 2, as a signed number."""
    word = config.stream & 0xFFFFFFFF
    return word - 2**32 if word >= 2**31 else word


def dense_parameter(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.contiguous()


def promised(output: Operand, input: Tensor) -> Tensor:
    """The output with the strides of ``empty_like(input)``, copied if it has others."""
    result, wanted = output.data, torch.empty_like(input)
    assert result is not None
    return result if result.stride() == wanted.stride() else wanted.copy_(result)
