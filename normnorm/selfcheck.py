"""Checks of every layer's forward and backward on a backend against the float64 reference.

Used by ``normnorm doctor`` and ``normnorm gradcheck``. Both sides get the same inputs, rounded to
the dtype under test, and the same noise.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normnorm import backends, functional
from normnorm.statistics import statistics_dtype

__all__ = ["CASES", "Case", "bound", "cases_and_backends", "finite_differences", "worst_errors"]

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SEED = 20250505
_EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One layer in one mode.

    Attributes:
        layer: the layer's class.
        kind: the op's kind.
        shape: the input's shape.
        training: whether noise is added; batch layers use running statistics otherwise.
    """

    layer: str
    kind: str
    shape: tuple[int, ...]
    training: bool

    @property
    def mode(self) -> str:
        return "training" if self.training else "eval"

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        return self.shape[-1:] if self.kind == "layer" else self.shape[1:2]

    def __call__(self, input: Tensor, weight: Tensor, bias: Tensor, running: Tensor) -> Tensor:
        """Calls the layer's function; ``running`` has mean, variance and lambda as rows and is
        updated in training."""
        mean, var, lmbda = running.unbind(0)
        common: dict[str, Any] = {"noise_train": 0.4, "seed": _SEED}
        if self.kind == "batch":
            return functional.batch_normal_norm(
                input, mean, var, lmbda, weight, bias, self.training, eps=_EPS, **common
            )
        if self.kind == "layer":
            return functional.layer_normal_norm(
                input, self.shape[-1:], weight, bias, _EPS, training=self.training, **common
            )
        if self.kind == "group":
            return functional.group_normal_norm(
                input, 4, weight, bias, _EPS, training=self.training, **common
            )
        return functional.instance_normal_norm(
            input, mean, var, lmbda, weight, bias, eps=_EPS, training=self.training, **common
        )


_LAYERS = (
    ("BatchNormalNorm1d", "batch", (96, 8)),
    ("BatchNormalNorm2d", "batch", (4, 8, 7, 9)),
    ("BatchNormalNorm3d", "batch", (2, 8, 3, 5, 4)),
    ("LayerNormalNorm", "layer", (12, 5, 96)),
    ("GroupNormalNorm", "group", (3, 8, 7, 5)),
    ("InstanceNormalNorm1d", "instance", (3, 8, 37)),
    ("InstanceNormalNorm2d", "instance", (3, 8, 7, 9)),
    ("InstanceNormalNorm3d", "instance", (2, 8, 3, 5, 4)),
)
CASES = tuple(
    Case(layer, kind, shape, training)
    for layer, kind, shape in _LAYERS
    for training in (True, False)
)


def bound(dtype: torch.dtype, device: str = "cpu") -> float:
    """The largest error of a correct backend, relative to the largest value of a result.

    One rounding of the stored result, and 16 units of the arithmetic's rounding, for sums over a
    hundred-odd elements, a logarithm, a power, and the Newton step's division by the curvature. GPU
    instructions for logarithm and power err by 2^-22 in float32, four times as much.
    """
    computed = statistics_dtype(dtype)
    times = 4 if device == "cuda" and computed == torch.float32 else 1
    return torch.finfo(dtype).eps + 16 * times * torch.finfo(computed).eps


def _operands(case: Case, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """(input, weight, bias, running, grad_output): skewed data, rounded to the dtype."""
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    input = torch.exp(0.5 * normal(*case.shape)) + 0.3 * normal(*case.shape)
    weight, bias = 1.0 + 0.2 * normal(*case.parameter_shape), normal(*case.parameter_shape)
    channels = case.shape[1]
    running = torch.stack(
        [1.0 + 0.1 * normal(channels), 0.5 + normal(channels).square(), 1 + 0.3 * normal(channels)]
    )
    return tuple(t.to(dtype) for t in (input, weight, bias, running, normal(*case.shape)))


def _results(case: Case, operands: tuple[Tensor, ...], backend: str) -> dict[str, Tensor]:
    input, weight, bias, running, grad_output = operands
    leaves = [t.clone().requires_grad_() for t in (input, weight, bias)]
    running = running.clone()
    with backends.use_backend(backend):
        output = case(leaves[0], leaves[1], leaves[2], running)
        gradients = torch.autograd.grad(output, leaves, grad_output)
    names = ("grad_input", "grad_weight", "grad_bias")
    return {
        "output": output.detach(), **dict(zip(names, gradients, strict=True)), "running": running
    }  # fmt: skip


def worst_errors(case: Case, backend: str, dtype: torch.dtype, device: str) -> dict[str, float]:
    """For each result, the largest difference from the float64 reference relative to the result's
    largest value; NaN if the backend returned one."""
    operands = _operands(case, dtype)
    expected = _results(case, tuple(t.double() for t in operands), "reference")
    got = _results(case, tuple(t.to(device) for t in operands), backend)
    return {
        name: ((got[name].double().cpu() - value).abs().max() / value.abs().max()).item()
        for name, value in expected.items()
    }


def finite_differences(case: Case, backend: str, device: str) -> bool:
    """Whether the float64 gradients agree with finite differences (torch.autograd.gradcheck).
    Without noise, whose scale is a constant to the gradient but not to finite differences."""
    input, weight, bias, running, _ = (t.to(device) for t in _operands(case, torch.float64))
    quiet = Case(case.layer, case.kind, case.shape, False)
    if case.kind == "batch" and case.training:

        def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return functional.batch_normal_norm(
                x, None, None, None, w, b, True, eps=_EPS, noise_train=0.0
            )
    else:

        def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
            return quiet(x, w, b, running.clone())

    leaves = tuple(t.clone().requires_grad_() for t in (input, weight, bias))
    with backends.use_backend(backend):
        return torch.autograd.gradcheck(function, leaves, raise_exception=False, fast_mode=True)


def cases_and_backends() -> Iterator[tuple[Case, str, str]]:
    """(case, backend, device) for every backend that can run and every device that it supports."""
    for name, reason in backends.available_backends().items():
        if reason is not None:
            continue
        device_type = backends.get(name).device_type
        devices = ["cpu"] if device_type in (None, "cpu") else [device_type]
        if device_type is None and torch.cuda.is_available():
            devices.append("cuda")
        for device in devices:
            for case in CASES:
                yield case, name, device
