"""``csrc/binding/cuda.cpp`` without a GPU: its ops on CPU tensors (``host_cuda/torch_library.py``).

Argument checks, layouts, copies, workspaces, statistics, running statistics, with the planner's
plans. ``test_cuda_host.py`` tests what the kernels compute, tier by tier, and the last test here
runs those of all backends.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import test_numerics
import torch
from host_cuda import torch_library
from oracle import CASES, Case
from raw_ops import backward_pass, both_passes, check, forward_pass, operands

import normnorm
from normnorm import selfcheck
from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(
    torch_library.missing() is not None, reason=str(torch_library.missing())
)
OPS = torch.ops.normnorm
BATCH = tuple(case for case in CASES if case.kind == "batch")


@pytest.fixture(autouse=True)
def host_run() -> Iterator[None]:
    with torch_library.served_by_host_run():
        yield


each_dtype, _name = test_numerics.each_dtype, test_numerics._name


@each_dtype
@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda c: f"{c.layer}-{c.mode}")
def test_layers_in_training_and_evaluation_agree_with_the_definition(case, dtype):
    errors = selfcheck.worst_errors(case, "cuda", dtype, "cpu")
    assert max(errors.values()) <= selfcheck.bound(dtype), errors


def _assert_agree(case, t, last=False, **options):
    """Both passes by the kernels and by the reference in float64, where only the order of sums
    differs."""
    found = [both_passes(name, case, t, (), last, **options) for name in ("cuda", "reference")]
    for got, want in zip(*found, strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_and_absent_parameters_reach_the_kernels(case):
    t = operands(case, torch.float64, law="exponential")
    for options in (
        {"alpha": 0.0},
        {"alpha": 0.3, "order": 1},
        {"eps": 1e-2, "transform_eps": 0.1},
        {"noise_train": 0.7, "stream": 3},
    ):
        _assert_agree(case, t, **options)
    for absent in (("weight",), ("bias",), ("weight", "bias")):
        given = {name: each for name, each in t.items() if name not in absent}
        _assert_agree(case, given, noise_train=0.7)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_given_noise_scale_is_used_and_kept(case):
    scale = torch.linspace(0.2, 1.7, 2 * case.groups, dtype=torch.float64)[::2]  # strided
    t = operands(case, torch.float64)
    _assert_agree(case, t, noise_scale=scale, noise_train=0.7)
    _, stats, _ = forward_pass("cuda", case, t, noise_scale=scale, noise_train=0.7)
    assert torch.equal(stats[Row.NOISE_SCALE], scale)


@each_dtype
@pytest.mark.parametrize("case", BATCH, ids=str)
def test_frozen_layers_with_and_without_noise(case, dtype):
    t, ramp = operands(case, torch.float64), torch.linspace(0.5, 1.5, case.groups)
    for place in (lambda r: r, lambda r: torch.stack([r, r], 1)[:, 1]):
        running = tuple(place(r.to(dtype)) for r in (ramp - 0.9, ramp, 2 - ramp))
        _assert_agree(case, t, running=running)
        _assert_agree(case, t, running=running, noise_train=0.7)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5)], ids=["columns", "rows"])
def test_frozen_layers_far_outside_their_statistics_are_finite(shape):
    """Their powers would overflow; the exponent is bounded."""
    running = [torch.full((4,), value) for value in (0.0, 1.0, 3.0)]
    x = 1e15 * (1 + torch.rand(shape))
    y, *_ = forward_pass("cuda", Case("batch", shape), {"x": x}, running=running)
    assert y.isfinite().all()


def test_running_statistics_as_rows_of_the_statistics():
    running = [torch.rand(4) + 0.5 for _ in range(3)]
    running[1][0] = torch.inf
    case = Case("batch", (6, 4))
    _, stats, _ = forward_pass("cuda", case, operands(case), running=running)
    assert torch.equal(stats[Row.MEAN], running[0])
    assert torch.equal(stats[Row.LMBDA], running[2])
    assert stats[Row.RSTD].isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(stats[Row.RSTD, 1:], (running[1][1:] + 1e-5).rsqrt())
    assert not stats[[Row.MEAN_LOW, Row.NOISE_SCALE, Row.MEAN_HD, Row.MEAN_D, Row.CURVATURE]].any()


VIEWS = {
    **test_numerics.LAYOUTS,
    "slice": lambda t: t[1::2, :, 1:-1, 2:],
    "expanded positions": lambda t: t[:, :, :1, :1].expand(-1, -1, 3, 4),
    "one channel": lambda t: t[:, :1],
    "one row": lambda t: t[:, :, :1],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["batch", "layer", "group", "instance"])
def test_views_give_what_the_definition_gives(view, kind):
    x = VIEWS[view](torch.randn(6, 8, 8, 9, dtype=torch.float64).exp())
    groups = 2 if kind == "group" and x.size(1) % 2 == 0 else int(kind == "group")
    case = Case(kind, tuple(x.shape), num_groups=groups, normalized_ndim=2 * (kind == "layer"))
    t = {**operands(case, torch.float64), "x": x}
    for last in (False, True):
        for noise in (0.0, 0.7):
            _assert_agree(case, t, last, noise_train=noise)


def test_upstream_gradients_of_any_strides_and_statistics_of_any():
    case = Case("batch", (6, 8, 8, 9))
    t = operands(case, torch.float64)
    y, stats, x = forward_pass("reference", case, t)
    strided = torch.stack([stats, stats], 2)[:, :, 1]
    permuted = t["g"].permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0)
    for g in (permuted, t["g"][:1, :, :1].expand(case.shape)):
        given = {**t, "g": g}
        want = backward_pass("reference", case, given, (y, stats, x))
        for kept in (stats, strided):
            got = backward_pass("cuda", case, given, (y, kept, x))
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_parameters_that_are_not_dense_or_begin_anywhere(dtype):
    case = Case("layer", (6, 64), normalized_ndim=1)
    t = operands(case, dtype, parameter_dtype=dtype)
    check("cuda", case, t)
    places = (lambda p: torch.stack([p, p], 1)[:, 1], lambda p: torch.cat([p[:1], p])[1:])
    for place in places:
        check("cuda", case, {**t, "weight": place(t["weight"]), "bias": place(t["bias"])})


def test_without_gradients_no_kernel_is_launched():
    case = Case("batch", (6, 4))
    t, stats = operands(case), torch.empty(len(Row), 4)
    torch_library.load().launches()
    saved = (t["x"], stats, t["x"])
    found = backward_pass("cuda", case, t, saved, needs=(False, False, False))
    assert [gradient.numel() for gradient in found] == [0, 0, 0]
    assert torch_library.load().launches() == []


def test_noise_in_an_order_without_a_layout_falls_back_to_the_reference():
    """The same bits as the reference."""
    (case,) = (case for case in CASES if case.kind == "layer" and len(case.shape) > 3)
    t = operands(case, last=True)
    both = [both_passes(n, case, t, (), True, noise_train=0.7) for n in ("cuda", "reference")]
    assert all(map(torch.equal, *both))


# --- running statistics ---------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("stats_dtype", [torch.float32, torch.float64], ids=_name)
@each_dtype
def test_the_fold_is_the_references_for_buffers_of_any_dtype_and_stride(
    dtype, stats_dtype, momentum
):
    stats = torch.rand(len(Row), 3, 10, dtype=stats_dtype).add_(0.5)[:, 1]
    found = {}
    for name in ("reference", "cuda"):
        running = [torch.linspace(0.2, 0.9, 10).add(i).to(dtype)[::2] for i in range(3)]
        tracked = torch.tensor(3)
        OPS.fold_running_(stats, *running, tracked, momentum, 40, 1e-5, name)
        found[name] = (*running, tracked)
    torch.testing.assert_close(
        found["cuda"], found["reference"], rtol=2 * oracle.UNIT[dtype], atol=1e-7
    )


def test_a_graph_that_saved_a_buffer_refuses_to_go_backward():
    layer = normnorm.BatchNormalNorm1d(4)
    x = torch.randn(8, 4)
    with normnorm.use_backend("cuda"):
        held = (x.requires_grad_() * layer.running_mean).sum()
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


# --- everything that runs on every backend --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        *((f"core/test_{name}.py", "cuda")
          for name in ("backends", "ops", "noise", "numerics", "bad_input", "fused")),
        ("distributed/test_sync.py", "equal_one_process or every_backend"),
    ],
)  # fmt: skip
def test_the_tests_of_all_backends_pass_on_this_one(file, chosen):
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "NORMNORM_HOST_RUN": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", chosen]
    done = subprocess.run(
        [*command, "-m", "not slow", str(Path(__file__).parents[1] / file)],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
