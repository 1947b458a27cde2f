"""Launches of the backward pass: one, or one a round, and those that add up parts."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from normnorm.config import Config

from . import folding, parameters, resident, streaming, table, walk
from .problem import (
    ABSENT,
    dense_parameter,
    device_of,
    find_problem,
    make_numbers,
    promised,
    stream_word,
)
from .table import ceil_div

__all__ = ["Backward"]


class Backward:
    """One backward pass; ``result`` is the output of the forward pass whose activation masks the
    gradient, ``grad_sum`` a gradient of the input to be added to its own."""

    def __init__(
        self, grad: Tensor, grad_sum: Tensor | None, input: Tensor, stats: Tensor,
        weight: Tensor | None, bias: Tensor | None, result: Tensor | None, seed: Tensor | None,
        needs: tuple[bool, ...], frozen: bool, config: Config,
    ) -> None:  # fmt: skip
        self.input, self.weight, self.bias, self.seed = input, weight, bias, seed
        self.needs, self.frozen, self.config = needs, frozen, config
        # the noise reaches no other gradient
        self.noisy = config.noise_train > 0.0 and needs[1]
        fused = config.kind == "layer" and (needs[1] or needs[2])
        output = torch.empty_like(input)
        optional = (result, grad_sum if needs[0] else None)
        tensors = (grad, input, output, *(t for t in optional if t is not None))
        p = find_problem(input, tensors, config, self.noisy, True, frozen, fused)
        # with sixteen warps there are no registers left for sums over all groups
        if fused and (not p.resident or p.plan.warps == table.LARGEST_WARPS):
            fused = False
            p = find_problem(input, tensors, config, self.noisy, True, frozen, False)
        self.p, self.fused = p, fused
        self.grad, self.x = p.read(grad, 0), p.read(input, 1)
        self.output = p.written(output, 2)
        self.result = ABSENT if result is None else p.read(result, 3)
        self.grad_sum = ABSENT
        if needs[0] and grad_sum is not None:
            self.grad_sum = p.read(grad_sum, len(tensors) - 1)
        self.stream = stream_word(config)
        self.stats = stats.contiguous()
        self.dense_weight = dense_parameter(weight)
        self.numbers = make_numbers(config, p.layout)

    @property
    def written(self) -> Tensor | None:
        """Where the gradient of the input goes, if it is asked for."""
        return self.output.tensor if self.needs[0] else None

    def run(self) -> tuple[Tensor, Tensor, Tensor]:
        with device_of(self.input):
            return self._run()

    def _run(self) -> tuple[Tensor, Tensor, Tensor]:
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
        nothing = self.input.new_empty(0)
        return (
            promised(self.output, self.input) if self.needs[0] else nothing,
            nothing if gradients[0] is None else gradients[0],
            nothing if gradients[1] is None else gradients[1],
        )

    @property
    def _at(self) -> tuple[tuple[int, ...] | None, ...]:
        operands = (self.grad, self.x, self.output, self.result, self.grad_sum)
        return tuple(operand.at for operand in operands)

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
        folding.fold_parts[(ceil_div(columns, folding.COLUMNS), 2)](
            parts[0], parts[1], outputs[0], outputs[1], rows, columns,
            min(folding.ROWS, table.power_of_two(rows)), folding.COLUMNS,
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
            self.grad.tensor, self.x.tensor, self.stats, self.dense_weight, self.seed,
            self.written, *parts, self.result.tensor, self.grad_sum.tensor, p.walk, *self._at,
            p.noise, self.stream, p.blocks, *self._scalars, which, p.spec, num_warps=p.plan.warps,
        )  # fmt: skip
        return self._fold(parts) if parts_wanted else (None, None)

    def _streaming(self, parts_wanted: bool) -> tuple[Tensor | None, Tensor | None]:
        p, splits = self.p, self.p.plan.splits
        shape = (7, splits, p.layout.groups)
        part = torch.empty(shape, dtype=self.stats.dtype, device=self.stats.device)
        asked = [needed and parts_wanted for needed in self.needs[1:]]

        def gradient(output: Tensor | None, sums: Tensor | None, to: Tensor | None) -> None:
            streaming.stream_gradient[(p.blocks * splits,)](
                self.grad.tensor, self.x.tensor, self.stats, self.dense_weight, self.seed, output,
                sums, to, self.result.tensor, self.grad_sum.tensor, p.walk, *self._at, p.noise,
                self.stream, splits, p.parts_given, *self._scalars, *asked, p.spec,
                num_warps=p.plan.warps,
            )  # fmt: skip

        if self.frozen:  # no gradient passes through the statistics: one pass does it all
            gradient(self.written, None, part if any(asked) else None)
        else:
            if self.written is not None or any(asked):
                gradient(None, None, part)
            if self.written is not None:
                gradient(self.written, p.folded(part[:5]), None)
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
        spec = replace(
            p.spec, WALK=walk.ROWS.value, R=plan.R, L=plan.L, K=1, NOISE=noise, EVEN=False,
            SHIFTED=False, SPLITS=1, LANES=1,
        )  # fmt: skip
        parts = self._parts(plan.splits, elements)
        parameters.parameter_sums[(programs * plan.splits,)](
            self.grad.tensor, self.x.tensor, self.stats, self.seed, *parts, self.result.tensor,
            p.walk, self.grad.at, self.x.at, self.result.at, p.noise, rows, row_runs,
            self.stream, plan.splits, self.numbers.transform_eps, self.numbers.noise_train, spec,
            num_warps=plan.warps,
        )  # fmt: skip
        return self._fold(parts)
