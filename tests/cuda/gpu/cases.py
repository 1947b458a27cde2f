"""Shapes, calls of the public functions and bounds of their results for the GPU tests.

A result is compared with the reference in float64 on the same device, with the same noise. Its
bound is the rounding to storage, 64 rounding units relative to the largest value, and the error of
the normals. A unit is 2^-22 on a GPU, the error of its special-function instructions, and 2^-24 in
a dry run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from normnorm import functional, reference
from normnorm.noise import standard_normals

from .rig import Rig, mode

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SEED = 20260105
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_UNITS = 64


@dataclass(frozen=True)
class Case:
    """A layer kind, with its shapes on a GPU and in a dry run.

    Attributes:
        name: of the test's parameter.
        kind: of the ops.
        gpu, dry: the two shapes.
        groups: channel groups of kind "group".
        trailing: normalized dimensions of kind "layer".
    """

    name: str
    kind: str
    gpu: tuple[int, ...]
    dry: tuple[int, ...]
    groups: int = 0
    trailing: int = 0

    def shape(self, rig: Rig) -> tuple[int, ...]:
        return rig.pick(self.gpu, self.dry)


CASES = (
    Case("batch-2d", "batch", (32, 64, 28, 28), (3, 4, 6, 6)),
    Case("batch-2d-odd", "batch", (13, 37, 7, 7), (3, 5, 3, 3)),
    Case("batch-nc", "batch", (4096, 96), (40, 6)),
    Case("batch-nc-odd", "batch", (1003, 129), (21, 5)),
    Case("batch-1d", "batch", (16, 33, 257), (3, 4, 9)),
    Case("batch-3d", "batch", (4, 6, 9, 10, 11), (2, 3, 2, 3, 4)),
    Case("layer", "layer", (512, 1024), (5, 64), trailing=1),
    Case("layer-odd", "layer", (300, 1128), (7, 37), trailing=1),
    Case("layer-long", "layer", (6, 65536), (2, 3000), trailing=1),
    Case("layer-2d", "layer", (9, 5, 48, 50), (2, 3, 4, 5), trailing=2),
    Case("group", "group", (8, 32, 20, 20), (2, 6, 4, 4), groups=2),
    Case("group-odd", "group", (5, 30, 7, 9), (2, 6, 3, 5), groups=6),
    Case("instance", "instance", (6, 16, 40, 40), (2, 3, 6, 6)),
    Case("instance-1d", "instance", (5, 8, 1001), (2, 3, 37)),
    Case("instance-3d", "instance", (3, 4, 8, 9, 10), (2, 2, 2, 3, 4)),
)


@dataclass
class Call:
    """One call: operands on the rig's device, and options of the function.

    Attributes:
        rig, case: where and what.
        input, grad, weight, bias: the operands; ``grad`` is the output's gradient.
        running: (mean, var, lmbda) of a batch layer in evaluation; else None.
        options: ``noise_train`` and the other numbers of the function; ``expected`` takes the
            seed :data:`SEED`.
        residual, relu: the epilogue.
        grad_sum: a gradient that is added to the input's.
        found: with ``relu``, the output, whose sign decides where the gradient passes.
    """

    rig: Rig
    case: Case
    input: Tensor
    grad: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running: tuple[Tensor, Tensor, Tensor] | None = None
    options: dict[str, Any] = field(default_factory=lambda: {"noise_train": 0.0})
    residual: Tensor | None = None
    relu: bool = False
    grad_sum: Tensor | None = None
    found: Tensor | None = None

    def __call__(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        common = dict(self.options)
        if self.residual is not None or self.relu:
            common |= {"residual": self.residual, "activation": "relu" if self.relu else None}
        if "seed" not in common:  # not made here under capture
            common["seed"] = torch.tensor([SEED], device=x.device)
        kind = self.case.kind
        if kind == "batch":
            running = self.running or (None, None, None)
            return functional.batch_normal_norm(
                x, *running, weight, bias, self.running is None, **common
            )
        if kind == "layer":
            shape = x.shape[x.dim() - self.case.trailing :]
            return functional.layer_normal_norm(x, shape, weight, bias, training=True, **common)
        if kind == "group":
            return functional.group_normal_norm(
                x, self.case.groups, weight, bias, training=True, **common
            )
        return functional.instance_normal_norm(
            x, None, None, None, weight, bias, training=True, **common
        )

    def results(self) -> dict[str, Tensor]:
        """Output and gradients by the chosen backend."""
        leaves = self.leaves()
        y = self(leaves["input"], leaves.get("weight"), leaves.get("bias"))
        self.found = y.detach()
        gradients = torch.autograd.grad(y, list(leaves.values()), self.grad)
        return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Those of input, weight and bias that are given, as leaves."""
        given = {"input": self.input, "weight": self.weight, "bias": self.bias}
        return {
            name: t.detach().to(dtype or t.dtype).requires_grad_()
            for name, t in given.items()
            if t is not None
        }

    @property
    def channels_last(self) -> bool:
        """Whether the noise counts in channels_last order."""
        dense = self.input.dim() in (4, 5) and not self.input.is_contiguous()
        return dense and self.input.movedim(1, -1).is_contiguous()

    def expected(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        """(results, statistics, noise) of the reference in float64."""
        z = None
        if self.options.get("noise_train"):
            seed = torch.tensor([SEED], device=self.input.device)
            z = standard_normals(self.input.shape, seed, 0, self.channels_last)
        leaves = self.leaves(torch.float64)
        frozen = None
        if self.running is not None:
            running = (t.double() for t in self.running)
            frozen = reference.pack_running(*running, 1e-5, torch.float64)
        y, stats = reference.normal_norm(
            leaves["input"], leaves.get("weight"), leaves.get("bias"), kind=self.case.kind,
            num_groups=self.case.groups, normalized_ndim=self.case.trailing, z=z, frozen=frozen,
            **self.options,
        )  # fmt: skip
        g, output = self.grad.double(), y.detach()
        if self.residual is not None:
            output = output + self.residual.double()
        if self.relu:
            g, output = torch.where(self.found <= 0, 0.0, g), output.relu()
        gradients = torch.autograd.grad(y, list(leaves.values()), g)
        want = {"output": output, **dict(zip(leaves, gradients, strict=True))}
        if self.grad_sum is not None:
            want["input"] = want["input"] + self.grad_sum.double()
        return want, stats, z


def make(
    rig: Rig,
    case: Case,
    dtype: torch.dtype = torch.float32,
    *,
    channels_last: bool = False,
    evaluation: bool = False,
    parameter_dtype: torch.dtype | None = None,
    shape: tuple[int, ...] | None = None,
    **options: Any,
) -> Call:
    """Skewed input, so that no lambda is 1, a weight of both signs, and an upstream gradient."""
    shape = shape or case.shape(rig)
    device = rig.device

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, device=device)

    x = normal(*shape)
    x = torch.where(torch.rand(shape, device=device) < 0.3, (0.7 * x).exp(), x).to(dtype)
    g = normal(*shape).to(dtype)
    if channels_last:
        memory = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, g = x.to(memory_format=memory), g.to(memory_format=memory)
    per = shape[len(shape) - case.trailing :] if case.kind == "layer" else (shape[1],)
    kept = parameter_dtype or (dtype if dtype == torch.float64 else torch.float32)
    weight = (torch.rand(per, device=device) + 0.5) * torch.where(normal(*per) < 0, -1.0, 1.0)
    bias = normal(*per).to(kept)
    running = None
    if evaluation:
        channels = shape[1]
        running = (
            (0.3 * normal(channels)).to(kept),
            (0.5 + torch.rand(channels, device=device)).to(kept),
            (1 + 0.4 * normal(channels)).clamp(-1, 3).to(kept),
        )
    return Call(
        rig, case, x, g, weight.to(kept), bias, running, {"noise_train": 0.0, **options}
    )  # fmt: skip


def arithmetic_unit(rig: Rig, dtype: torch.dtype) -> float:
    return 2.0**-53 * 16 if dtype == torch.float64 else rig.unit


def normal_error(z: Tensor, unit: float, channels_last: bool) -> Tensor:
    """The error bound of each normal.

    A pair is a radius r = sqrt(-2 log u) at an angle. The logarithm errs absolutely near u = 1, by
    two units in r^2, so that r is off by that over r, yet at most by its root; sine and cosine err
    absolutely too, and so does the angle, together by less than eight units.
    """
    order = (0, *range(2, z.dim()), 1) if channels_last else tuple(range(z.dim()))
    flat = z.permute(order).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).reshape(-1, 2)
    radius = padded.norm(dim=1, keepdim=True).expand(-1, 2).reshape(-1)[: flat.numel()]
    error = torch.minimum(
        torch.full_like(radius, (2 * unit) ** 0.5), 2 * unit / radius.clamp_min(unit)
    )
    sizes = [z.shape[i] for i in order]
    inverse = sorted(range(z.dim()), key=order.__getitem__)
    return (error + 8 * unit * radius).reshape(sizes).permute(inverse)


def assert_close(
    got: Tensor, want: Tensor, unit: float, what: str, *, times: float = 1.0, least: float = 0.0,
    extra: Tensor | float = 0.0,
) -> None:  # fmt: skip
    """``least``: the size of the terms, where the result is a difference that may cancel;
    ``extra``: a further allowed error."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    exact, value = want.double(), got.double()
    scale = exact.abs().max().clamp_min(least)
    allowed = times * _UNITS * unit * scale + 1.01 * _ROUNDING.get(got.dtype, 0.0) * exact.abs()
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # its smallest step
    error = (value - exact).abs()
    good = error <= allowed + extra  # false for NaN
    if not bool(good.all()):
        worst = torch.where(good, 0.0, (error / (allowed + extra)).nan_to_num(torch.inf))
        at = int(worst.flatten().argmax())
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} elements out of bounds; worst at flat "
            f"index {at}: got {value.flatten()[at].item():.9g}, wanted "
            f"{exact.flatten()[at].item():.9g}, {worst.max().item():.3g} times the allowed error"
        )


def check(call: Call) -> dict[str, Tensor]:
    """Compares the chosen backend's output and gradients with the reference; returns them."""
    got = call.results()
    compare(call, got)
    return got


def compare(call: Call, got: dict[str, Tensor]) -> None:
    """Compares results of ``call`` with the reference."""
    if mode() == "compile":
        return
    want, stats, z = call.expected()
    unit = arithmetic_unit(call.rig, call.input.dtype)
    noise: Tensor | float = 0.0
    noise_in_weight: Tensor | float = 0.0
    if z is not None:
        # |noise| error of an element before the affine map; s is at most its largest group's
        scale = float(stats[4].max()) * call.options["noise_train"]
        error = scale * normal_error(z, unit, call.channels_last)
        weight = 1.0 if call.weight is None else call.weight.double().abs().max()
        noise = error * weight
        dims = _summed(call)
        noise_in_weight = (call.grad.double().abs() * error).sum(dims)
        if call.case.kind == "layer":
            noise_in_weight = noise_in_weight.reshape(call.input.shape[-call.case.trailing :])
    assert_close(got["output"], want["output"], unit, "output", extra=noise)
    size = float((stats[2].max() * call.grad.double().abs().max()).item())
    assert_close(got["input"], want["input"], unit, "input's gradient", times=4, least=size)
    if "weight" in got:
        assert_close(
            got["weight"], want["weight"], unit, "weight's gradient", times=4,
            extra=noise_in_weight,
        )  # fmt: skip
    if "bias" in got:
        assert_close(got["bias"], want["bias"], unit, "bias's gradient", times=4)


def _summed(call: Call) -> tuple[int, ...]:
    """The dimensions over which elements share a weight."""
    dim = call.input.dim()
    if call.case.kind == "layer":
        return tuple(range(dim - call.case.trailing))
    return (0, *range(2, dim))


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor], what: str) -> None:
    """Bit for bit."""
    if mode() == "compile":
        return
    for name, value in first.items():
        assert torch.equal(value, second[name]), f"{what}: {name} differs"


def case_named(name: str) -> Case:
    return next(case for case in CASES if case.name == name)
