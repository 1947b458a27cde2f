"""Each layer kind, dtype and memory format against the reference in float64."""

from __future__ import annotations

import pytest
import torch

from normnorm import selfcheck

from .cases import CASES, DTYPES, case_named, check, make

FORMATS = [
    pytest.param(case, last, id=f"{case.name}{'-last' if last else ''}")
    for case in CASES
    for last in ((False, True) if len(case.gpu) > 3 and case.kind != "layer" else (False,))
]


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "last"), FORMATS)
def test_training(rig, backend, case, last, dtype, noise):
    check(make(rig, case, dtype, channels_last=last, noise_train=noise))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "last"), [p for p in FORMATS if p.values[0].kind == "batch"])
def test_evaluation(rig, backend, case, last, dtype):
    check(make(rig, case, dtype, channels_last=last, evaluation=True))


@pytest.mark.parametrize("length", [1, 2, 3, 31, 37, 760, 1000, 1128, 2047, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_row_lengths(rig, backend, length, dtype):
    rows = rig.pick(67, 3)
    check(make(rig, case_named("layer"), dtype, shape=(rows, length), noise_train=1.0))


@pytest.mark.parametrize("absent", ["weight", "bias", "both"])
@pytest.mark.parametrize("name", ["batch-2d", "layer", "group"])
def test_absent_parameters(rig, backend, name, absent):
    call = make(rig, case_named(name), torch.bfloat16, noise_train=0.5)
    if absent != "bias":
        call.weight = None
    if absent != "weight":
        call.bias = None
    check(call)


@pytest.mark.parametrize("name", ["batch-2d", "batch-nc", "layer", "group", "instance"])
def test_parameters_in_half_precision(rig, backend, name):
    half = torch.bfloat16
    check(make(rig, case_named(name), half, parameter_dtype=half, noise_train=0.5))


@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_slices_of_larger_tensors(rig, backend, name):
    """Inputs with an offset and a stride."""
    call = make(rig, case_named(name), torch.bfloat16, noise_train=0.5)
    if name == "layer":
        rows, length = call.input.shape
        wide = torch.randn(rows, length + 3, device=rig.device, dtype=call.input.dtype)
        wide[:, 1:-2] = call.input
        call.input = wide[:, 1:-2]
    else:
        n, c, *rest = call.input.shape
        wide = torch.randn(n, c + 3, *rest, device=rig.device, dtype=call.input.dtype)
        wide[:, 2:-1] = call.input
        call.input = wide[:, 2:-1]
    check(call)


def test_expanded_gradient(rig, backend):
    """The gradient of a mean has stride 0."""
    call = make(rig, case_named("batch-2d"), noise_train=0.5)
    call.grad = (torch.ones((), device=rig.device) / call.input.numel()).expand_as(call.input)
    assert set(call.grad.stride()) == {0}
    check(call)


OPTIONS = {
    "order 1": {"order": 1, "alpha": 0.3},
    "alpha 0": {"alpha": 0.0},
    "shifted": {"transform_eps": 1e-5**0.5},
}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_options(rig, backend, name, option):
    check(make(rig, case_named(name), noise_train=0.5, **OPTIONS[option]))


@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda c: f"{c.layer}-{c.mode}")
def test_gradients_agree_with_finite_differences(rig, backend, case):
    assert selfcheck.finite_differences(case, backend, str(rig.device))


@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_a_constant_group_and_a_bad_value_stay_in_their_group(rig, backend, name):
    call = make(rig, case_named(name), torch.float32)
    call.input = call.input.clone()
    group = (slice(None), 0) if name == "batch-2d" else (0,)
    other = (slice(None), 1) if name == "batch-2d" else (1,)
    call.input[group] = 3.0
    first = next(iter(zip(*torch.where(torch.ones_like(call.input[other])), strict=True)))
    call.input[other][first] = torch.inf
    y = call.results()["output"]
    assert y[group].isfinite().all()
    assert y[other].isnan().all()
    assert y.isnan().sum() == y[other].numel()
