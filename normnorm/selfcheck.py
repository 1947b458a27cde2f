"""``normnorm gradcheck``: every layer's forward and backward on every backend, in every dtype,
against the float64 reference.

Both sides get the same inputs, rounded to the dtype under test, and the same noise. ``normnorm
doctor`` runs the same cases.
"""

import argparse
import itertools
import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import backends, functional
from .statistics import statistics_dtype

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_SEED = 20250505
_EPS = 1e-5


class Case(NamedTuple):
    """One layer's class in one mode: with noise in training; without it, and with running
    statistics in batch layers, in evaluation."""

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

    def __call__(
        self, input: Tensor, weight: Tensor, bias: Tensor, running: Tensor, noise_train: float = 0.4
    ) -> Tensor:
        """Calls the layer's function. ``running``: mean, variance, lambda; updated in training."""
        common: dict[str, Any] = {
            "weight": weight, "bias": bias, "eps": _EPS, "training": self.training,
            "noise_train": noise_train, "seed": _SEED,
        }  # fmt: skip
        if self.kind == "layer":
            return functional.layer_normal_norm(input, self.shape[-1:], **common)
        if self.kind == "group":
            return functional.group_normal_norm(input, 4, **common)
        layer: Any = functional.batch_normal_norm
        if self.kind == "instance":
            layer = functional.instance_normal_norm
        return layer(input, *running.unbind(0), **common)


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
    *operands, running, _ = (t.to(device) for t in _operands(case, torch.float64))

    def function(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return case(x, w, b, running.clone(), noise_train=0.0)

    leaves = tuple(t.clone().requires_grad_() for t in operands)
    with backends.use_backend(backend):
        return torch.autograd.gradcheck(function, leaves, raise_exception=False, fast_mode=True)


def described(case: Case, backend: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """What one check tests, and its bound: the first columns of the commands' tables."""
    return {
        "layer": case.layer,
        "mode": case.mode,
        "backend": backend,
        "device": device,
        "dtype": dtype_name(dtype),
        "bound": bound(dtype, device),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cases_and_backends() -> Iterator[tuple[Case, str, str]]:
    """(case, backend, device) for every backend that can run and every device that it supports."""
    for name, reason in backends.available_backends().items():
        if reason is not None:
            continue
        device_type = backends.get(name).device_type
        devices = [device_type or "cpu"]
        if device_type is None and torch.cuda.is_available():
            devices.append("cuda")
        for device in devices:
            for case in CASES:
                yield case, name, device


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the table as JSON")
    parser.add_argument(
        "--backend",
        choices=[n for n, reason in backends.available_backends().items() if reason is None],
        help="check only this backend",
    )


def table(only: str | None = None) -> list[dict[str, Any]]:
    """One row for each layer, backend and dtype: errors of the map with noise, and in float64 the
    comparison with finite differences, which is independent of the reference."""
    rows = []
    for (case, backend, device), dtype in itertools.product(cases_and_backends(), DTYPES):
        if only not in (None, backend):
            continue
        row = described(case, backend, device, dtype)
        errors = worst_errors(case, backend, dtype, device)
        passed = all(error <= row["bound"] for error in errors.values())
        differences = None
        if dtype == torch.float64:
            differences = finite_differences(case, backend, device)
            passed = passed and differences
        rows.append({**row, "finite_differences": differences, "errors": errors, "passed": passed})
    return rows


def _print_table(rows: list[dict[str, Any]]) -> None:
    names = ("output", "grad_input", "grad_weight", "grad_bias", "running")
    print("largest error against the float64 reference, in units of the bound (1 is a miss);")
    print("float64 also against finite differences, with the noise off\n")
    print(
        f"{'layer':22}{'mode':10}{'backend':11}{'device':8}{'dtype':10}"
        + "".join(f"{name:>12}" for name in names)
        + f"{'differences':>13}"
    )
    for row in rows:
        differences = {None: "-", True: "ok", False: "MISS"}[row["finite_differences"]]
        print(
            f"{row['layer']:22}{row['mode']:10}{row['backend']:11}{row['device']:8}{row['dtype']:10}"
            + "".join(f"{row['errors'][name] / row['bound']:12.3f}" for name in names)
            + f"{differences:>13}"
            + ("" if row["passed"] else "  MISS")
        )
    missed = sum(not row["passed"] for row in rows)
    print(f"\n{len(rows) - missed} passed, {missed} missed")


def run(arguments: argparse.Namespace) -> int:
    """Prints the table; exit status 1 if a gradient missed its bound."""
    rows = table(arguments.backend)
    if arguments.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table(rows)
    return 0 if all(row["passed"] for row in rows) else 1
