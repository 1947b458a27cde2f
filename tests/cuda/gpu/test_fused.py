"""A fused residual, activation and pre-norm sum against the definition in float64: the public
functions, and every tier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from host_cuda import harness
from host_cuda.cases import COLUMN_TIERS, COLUMNS, FUSIONS, ROW_TIERS, ROWS, fuse
from torch import Tensor

from normnorm import functional as F

from . import forced
from .cases import CASES, DTYPES, SEED, Call, Case, assert_same, case_named, compare, make
from .conftest import DRY

FUSED = [
    pytest.param(case_named(name), last, id=f"{name}{'-last' if last else ''}")
    for name, last in (
        ("batch-2d", False), ("batch-2d", True), ("batch-2d-odd", False), ("batch-2d-odd", True),
        ("batch-nc", False), ("layer", False), ("layer-odd", False), ("layer-long", False),
        ("layer-2d", False), ("group", False), ("group-odd", True), ("instance-1d", False),
    )
]  # fmt: skip


@dataclass
class FusedCall(Call):
    """A call with fused operations.

    Attributes:
        residual, relu: the epilogue.
        grad_sum: the gradient of the normalized sum.
        found: the output, whose sign decides where the gradient passes.
    """

    residual: Tensor | None = None
    relu: bool = False
    grad_sum: Tensor | None = None
    found: Tensor | None = None

    def expected(self) -> tuple[dict[str, Tensor], Tensor, Tensor | None]:
        whole = self.grad
        if self.relu:
            self.grad = torch.where(self.found <= 0, 0.0, whole)
        want, stats, z = super().expected()
        self.grad = whole
        if self.residual is not None:
            want["output"] = want["output"] + self.residual.double()
        if self.relu:
            want["output"] = want["output"].relu()
        if self.grad_sum is not None:
            want["input"] = want["input"] + self.grad_sum.double()
        return want, stats, z


def _fused(call: Call, **fused: Any) -> FusedCall:
    return FusedCall(
        call.rig, call.case, call.input, call.grad, call.weight, call.bias, call.running,
        call.options, **fused,
    )  # fmt: skip


def _leaves(call: Call) -> dict[str, Tensor]:
    tensors = {"input": call.input, "weight": call.weight, "bias": call.bias}
    return {name: t.detach().requires_grad_() for name, t in tensors.items() if t is not None}


def _with_epilogue(call: Call, residual: Tensor | None, relu: bool) -> dict[str, Tensor]:
    """Output and gradients of the function with an epilogue."""
    plain, leaves = dict(call.options), _leaves(call)
    call.options = {**plain, "residual": residual, "activation": "relu" if relu else None}
    y = call(leaves["input"], leaves["weight"], leaves["bias"])
    call.options = plain
    gradients = torch.autograd.grad(y, list(leaves.values()), call.grad)
    return {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "last"), FUSED)
def test_residual_and_relu(rig, backend, case, last, dtype, noise):
    call = make(rig, case, dtype, channels_last=last, noise_train=noise)
    residual = torch.randn_like(call.input)
    for given, relu in ((residual, True), (residual, False), (None, True)):
        got = _with_epilogue(call, given, relu)
        compare(_fused(call, residual=given, relu=relu, found=got["output"]), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_evaluation(rig, backend, last, dtype):
    call = make(rig, case_named("batch-2d"), dtype, channels_last=last, evaluation=True)
    residual = torch.randn_like(call.input)
    got = _with_epilogue(call, residual, True)
    compare(_fused(call, residual=residual, relu=True, found=got["output"]), got)


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "layer"], ids=lambda c: c.name)
def test_residual_stream(rig, backend, case, dtype, noise):
    call = make(rig, case, dtype, noise_train=noise)
    residual, grad_sum = torch.randn_like(call.input), torch.randn_like(call.input)
    leaves = _leaves(call)
    stream = residual.clone().requires_grad_()
    shape = call.input.shape[call.input.dim() - case.trailing :]
    seed = torch.tensor([SEED], device=rig.device)
    y, total = F.add_layer_normal_norm(
        leaves["input"], stream, shape, leaves["weight"], leaves["bias"], training=True, seed=seed,
        **call.options,
    )  # fmt: skip
    assert torch.equal(total, call.input + residual)
    *gradients, through_stream = torch.autograd.grad(
        (y, total), (*leaves.values(), stream), (call.grad, grad_sum)
    )
    got = {"output": y.detach(), **dict(zip(leaves, gradients, strict=True))}
    assert torch.equal(got["input"], through_stream)
    call.input = total.detach()
    compare(_fused(call, grad_sum=grad_sum), got)


# --- every tier, by the launchers -----------------------------------------------------------------


FORCED_DTYPES = DTYPES[:1] if DRY else DTYPES
FORCED = [
    (case, tier, columns)
    for cases, tiers, columns in (
        (("layer", "layer-ragged", "batch", "batch-ragged", "group"), ROW_TIERS, False),
        (("batch", "batch-ragged", "instance"), COLUMN_TIERS, True),
        (("group",), ("streaming",), True),
    )
    for case in (cases[:1] if DRY else cases)
    for tier in tiers
]


@pytest.fixture(scope="module")
def kernels(rig):
    return forced.kernels(rig)


@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "tier", "columns"), FORCED)
def test_forced_tiers(rig, kernels, case, tier, columns, dtype):
    kind, shape, extra = (COLUMNS if columns else ROWS)[case]
    groups, trailing = extra.get("num_groups", 0), extra.get("normalized_ndim", 0)
    given = Case(kind, kind, shape, shape, groups, trailing)
    last = columns and len(shape) == 4
    call = make(rig, given, dtype, channels_last=last, noise_train=0.7)
    served = fuse(
        harness.Call(
            kind, call.input, call.weight, call.bias, num_groups=groups, normalized_ndim=trailing,
            noise_train=0.7, seed=SEED, columns=columns,
            force=(COLUMN_TIERS if columns else ROW_TIERS)[tier],
        ),
        FUSIONS["both"],
    )  # fmt: skip
    results = []
    for _ in range(2):
        with rig.device:  # where the harness makes its tensors
            output, stats = served.forward(kernels)
            du, dw, db = served.backward(kernels, call.grad, stats)
        results.append({"output": output, "input": du, "weight": dw, "bias": db})
    assert torch.equal(served.sum, call.input + served.addend)
    call.input = served.sum
    wanted = _fused(
        call, residual=served.residual, relu=True, grad_sum=served.grad_sum, found=output
    )
    compare(wanted, results[0])
    assert_same(*results, "the same again")
