"""Each layer kind, dtype and memory format against the reference in float64."""

import pytest
import torch
from oracle import Case
from raw_ops import both_passes
from tiers import DTYPES, FUSIONS

from normnorm import selfcheck

from .cases import CASES, check, make

FORMATS = [
    pytest.param(name, last, id=f"{name}{'-last' if last else ''}")
    for name, (case, _) in CASES.items()
    for last in ((False, True) if len(case.shape) > 3 and case.kind != "layer" else (False,))
]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d)[6:])
NOISE = {"noise_train": 0.5}


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["quiet", "noise"])
@each_dtype
@pytest.mark.parametrize(("name", "last"), FORMATS)
def test_training(rig, backend, name, last, dtype, noise):
    case = rig.pick(*CASES[name])
    t = make(rig, case, dtype, last)
    for fused in ((), *FUSIONS[:2]):
        check(rig, backend, case, t, fused, last, noise_train=noise)


@each_dtype
@pytest.mark.parametrize(("name", "last"), [p for p in FORMATS if p.values[0].startswith("batch")])
def test_evaluation(rig, backend, name, last, dtype):
    case = rig.pick(*CASES[name])
    mean, var, lmbda = (torch.rand(case.groups, device=rig.device) for _ in range(3))
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    running = tuple(r.to(kept) for r in (mean - 0.5, var + 0.5, 2.5 * lmbda - 0.5))
    for fused in ((), FUSIONS[0]):
        check(rig, backend, case, make(rig, case, dtype, last), fused, last, running=running)


@pytest.mark.parametrize("length", [1, 2, 3, 31, 37, 760, 1000, 1128, 2047, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_row_lengths(rig, backend, length, dtype):
    case = Case("layer", (rig.pick(67, 3), length), normalized_ndim=1)
    check(rig, backend, case, make(rig, case, dtype), noise_train=1.0)


@pytest.mark.parametrize("absent", [("weight",), ("bias",), ("weight", "bias")], ids=str)
@pytest.mark.parametrize("name", ["batch-2d", "layer", "group"])
def test_absent_parameters(rig, backend, name, absent):
    case = rig.pick(*CASES[name])
    t = make(rig, case, torch.bfloat16)
    check(rig, backend, case, {n: each for n, each in t.items() if n not in absent}, **NOISE)


@pytest.mark.parametrize("name", ["batch-2d", "batch-nc", "layer", "group", "instance"])
def test_parameters_in_half_precision(rig, backend, name):
    case, half = rig.pick(*CASES[name]), torch.bfloat16
    check(rig, backend, case, make(rig, case, half, parameter_dtype=half), **NOISE)


@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_slices_of_larger_tensors_and_an_expanded_gradient(rig, backend, name):
    """Inputs with an offset and a stride; the gradient of a mean has stride 0."""
    case = rig.pick(*CASES[name])
    t = make(rig, case, torch.bfloat16)
    wide = torch.zeros(case.shape[0], case.shape[1] + 3, *case.shape[2:], device=rig.device)
    x = wide.to(torch.bfloat16)[:, 2:-1].copy_(t["x"])
    g = t["g"].flatten()[:1].expand(case.shape)
    check(rig, backend, case, {**t, "x": x, "g": g}, **NOISE)


@pytest.mark.parametrize(
    "options",
    [{"order": 1, "alpha": 0.3}, {"alpha": 0.0}, {"transform_eps": 1e-5**0.5}],
    ids=["order 1", "alpha 0", "shifted"],
)
@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_options(rig, backend, name, options):
    case = rig.pick(*CASES[name])
    check(rig, backend, case, make(rig, case), **NOISE, **options)


@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda c: f"{c.layer}-{c.mode}")
def test_gradients_agree_with_finite_differences(rig, backend, case):
    assert selfcheck.finite_differences(case, backend, str(rig.device))


@pytest.mark.parametrize("name", ["batch-2d", "layer"])
def test_a_constant_group_and_a_bad_value_stay_in_their_group(rig, backend, name):
    case = rig.pick(*CASES[name])
    t = make(rig, case)
    groups = t["x"].transpose(0, 1) if name == "batch-2d" else t["x"]
    groups[0] = 3.0
    groups[1][(0,) * (groups.dim() - 1)] = torch.inf
    y, *_ = both_passes(backend, case, t)
    y = y.transpose(0, 1) if name == "batch-2d" else y
    assert y[0].isfinite().all()
    assert y[1].isnan().all()
    assert y.isnan().sum() == y[1].numel()
