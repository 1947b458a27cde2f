"""A fused residual, activation and pre-norm sum against the reference in float64, by the public
functions. ``test_tiers.py`` has them in every tier."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from normnorm import functional as F

from .cases import CASES, DTYPES, SEED, case_named, check, compare, make

FUSED = [
    pytest.param(case_named(name), last, id=f"{name}{'-last' if last else ''}")
    for name, last in (
        ("batch-2d", False), ("batch-2d", True), ("batch-2d-odd", False), ("batch-2d-odd", True),
        ("batch-nc", False), ("layer", False), ("layer-odd", False), ("layer-long", False),
        ("layer-2d", False), ("group", False), ("group-odd", True), ("instance-1d", False),
    )
]  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "last"), FUSED)
def test_residual_and_relu(rig, backend, case, last, dtype, noise):
    call = make(rig, case, dtype, channels_last=last, noise_train=noise)
    residual = torch.randn_like(call.input)
    for given, relu in ((residual, True), (residual, False), (None, True)):
        check(replace(call, residual=given, relu=relu))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_evaluation(rig, backend, last, dtype):
    call = make(rig, case_named("batch-2d"), dtype, channels_last=last, evaluation=True)
    check(replace(call, residual=torch.randn_like(call.input), relu=True))


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "layer"], ids=lambda c: c.name)
def test_residual_stream(rig, backend, case, dtype, noise):
    call = make(rig, case, dtype, noise_train=noise)
    residual, grad_sum = torch.randn_like(call.input), torch.randn_like(call.input)
    leaves = call.leaves()
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
    compare(replace(call, input=total.detach(), grad_sum=grad_sum), got)
