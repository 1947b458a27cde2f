"""The CUDA backend from layer to kernel, without a GPU: its ops on CPU tensors.

``csrc/binding/cuda.cpp`` and the kernels are built by g++ (``host_cuda/torch_library.py``), so that
this tests the code that serves a GPU: argument checks, layouts, copies, workspaces, statistics,
running statistics, gradients. ``test_cuda_host.py`` tests what the kernels compute, tier by tier;
here plans are automatic.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import oracle
import pytest
import torch
from host_cuda import torch_library
from layer_table import LAYERS, NAMES
from oracle import CASES, DTYPES, Case, draw, draw_parameters

import normnorm
from normnorm import selfcheck
from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(
    torch_library.missing() is not None, reason=str(torch_library.missing())
)
OPS = torch.ops.normnorm
NONE = (None, None, None)
DEEP = tuple(case for case in CASES if len(case.shape) > 3)
LAYER_LAST = tuple(case for case in DEEP if case.kind != "layer")


@pytest.fixture(autouse=True)
def host_run() -> Iterator[None]:
    with torch_library.served_by_host_run():
        yield


@pytest.fixture
def cuda() -> Iterator[None]:
    with normnorm.use_backend("cuda"):
        yield


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=_name)


def channels_last(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


# --- layers ---------------------------------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize("case", selfcheck.CASES, ids=lambda c: f"{c.layer}-{c.mode}")
def test_layers_in_training_and_evaluation_agree_with_the_definition(case, dtype):
    errors = selfcheck.worst_errors(case, "cuda", dtype, "cpu")
    assert max(errors.values()) <= selfcheck.bound(dtype), errors


@pytest.mark.parametrize("row", LAYERS, ids=NAMES)
def test_modules_give_what_they_give_on_the_reference(row):
    results = {}
    for name in ("reference", "cuda"):
        with normnorm.use_backend(name):
            torch.manual_seed(3)
            layer = row.make(dtype=torch.float64)
            x = row.input().requires_grad_()
            y = layer(x)
            y.square().sum().backward()
            state = [t.clone() for t in layer.state_dict().values()]
            gradients = [p.grad for p in (x, *layer.parameters())]
            results[name] = (y, layer.eval()(x), *gradients, *state)
    torch.testing.assert_close(results["cuda"], results["reference"], rtol=1e-10, atol=1e-10)


@pytest.mark.usefixtures("cuda")
@each_dtype
@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_in_both_memory_formats_is_within_the_oracles_bounds(case, dtype):
    weight, bias = draw_parameters(case, 1, dtype)
    for last in (False, True)[: 1 + (len(case.shape) > 3)]:
        x = draw(case, "lognormal", 1, dtype)
        x = channels_last(x) if last else x
        y, du = oracle.check(case, x, weight, bias, seed=5, noise_train=0.7, channels_last=last)
        assert y.stride() == du.stride() == torch.empty_like(x).stride()
        oracle.check(case, x, weight, bias, seed=5)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_parameter_without_the_other(case):
    weight, bias = draw_parameters(case, 1, torch.float32)
    x = draw(case, "exponential", 1, torch.float32)
    for parameters in ((weight, None), (None, bias), (None, None)):
        oracle.check(case, x, *parameters, seed=5, noise_train=0.7)


@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=_name)
@pytest.mark.parametrize("case", CASES[::3], ids=str)
def test_half_inputs_with_parameters_in_float32(case, dtype):
    weight, bias = draw_parameters(case, 1, torch.float32)
    oracle.check(case, draw(case, "relu", 1, dtype), weight, bias, seed=5, noise_train=0.7)


# --- raw ops --------------------------------------------------------------------------------------


def _forward(backend, case, x, weight=None, bias=None, running=NONE, scale=None, **options):
    """(output, statistics) of the raw op."""
    seed = torch.tensor([5]) if options.get("noise_train") else None
    config = case.config(backend, **options)
    return OPS.normal_norm_forward(
        x, *running, weight, bias, None, seed, scale, False, True, *config
    )[:2]  # fmt: skip


def _backward(backend, case, g, x, stats, weight=None, bias=None, frozen=False, **options):
    seed = torch.tensor([5]) if options.get("noise_train") else None
    needs = (True, weight is not None, bias is not None, frozen)
    config = case.config(backend, **options)
    return OPS.normal_norm_backward(g, x, stats, weight, bias, None, seed, None, *needs, *config)


def _assert_agree(case, x, running=NONE, **options):
    """Forward and backward by the kernels and by the reference in float64, where only the order of
    sums differs."""
    weight, bias = draw_parameters(case, 1, torch.float64)
    g = torch.randn(case.shape, dtype=torch.float64)
    found = {}
    for name in ("cuda", "reference"):
        output, stats = _forward(name, case, x, weight, bias, running, **options)
        frozen = running[0] is not None
        gradients = _backward(name, case, g, x, stats, weight, bias, frozen, **options)
        found[name] = (output, stats, *gradients)
    for got, want in zip(found["cuda"], found["reference"], strict=True):
        assert got.stride() == want.stride()
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_reach_the_kernels(case):
    x = draw(case, "exponential", 1, torch.float64)
    for options in (
        {"alpha": 0.0},
        {"alpha": 0.3, "order": 1},
        {"eps": 1e-2, "transform_eps": 0.1},
        {"noise_train": 0.7, "stream": 3},
    ):
        _assert_agree(case, x, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_given_noise_scale_is_used_and_kept(case):
    x = draw(case, "exponential", 1, torch.float64)
    scale = torch.linspace(0.2, 1.7, 2 * case.groups, dtype=torch.float64)[::2]  # strided
    found = [_forward(n, case, x, scale=scale, noise_train=0.7) for n in ("cuda", "reference")]
    torch.testing.assert_close(found[0], found[1], rtol=1e-9, atol=1e-9)
    assert torch.equal(found[0][1][Row.NOISE_SCALE], scale)


@each_dtype
@pytest.mark.parametrize("case", [c for c in CASES if c.kind == "batch"], ids=str)
def test_frozen_layers_with_and_without_noise(case, dtype):
    x = draw(case, "exponential", 1, torch.float64)
    channels = case.shape[1]
    ramp = torch.linspace(0.5, 1.5, channels, dtype=torch.float64)
    for running in (
        [t.to(dtype) for t in (ramp - 0.9, ramp, 2 - ramp)],
        [torch.stack([t, t], 1).to(dtype)[:, 1] for t in (ramp - 0.9, ramp, 2 - ramp)],
    ):
        _assert_agree(case, x, tuple(running))
        _assert_agree(case, x, tuple(running), noise_train=0.7)


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 5)], ids=["columns", "rows"])
def test_frozen_layers_far_outside_their_statistics_are_finite(shape):
    """Their powers would overflow; the exponent is bounded."""
    running = [torch.full((4,), value) for value in (0.0, 1.0, 3.0)]
    x = 1e15 * (1 + torch.rand(shape))
    assert _forward("cuda", Case("batch", shape), x, running=running)[0].isfinite().all()


def test_running_statistics_as_rows_of_the_statistics():
    running = [torch.rand(4) + 0.5 for _ in range(3)]
    running[1][0] = torch.inf
    stats = _forward("cuda", Case("batch", (6, 4)), torch.randn(6, 4), running=running)[1]
    assert torch.equal(stats[Row.MEAN], running[0])
    assert torch.equal(stats[Row.LMBDA], running[2])
    assert stats[Row.RSTD].isnan().tolist() == [True, False, False, False]
    torch.testing.assert_close(stats[Row.RSTD, 1:], (running[1][1:] + 1e-5).rsqrt())
    assert not stats[[Row.MEAN_LOW, Row.NOISE_SCALE, Row.MEAN_HD, Row.MEAN_D, Row.CURVATURE]].any()


VIEWS = {
    "slice": lambda t: t[1::2, :, 1:-1, 2:],
    "channel slice": lambda t: t[:, 2:6],
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "transposed": lambda t: t.transpose(2, 3),
    "expanded": lambda t: t[:, :, :1, :1].expand(-1, -1, 3, 4),
    "expanded samples": lambda t: t[:1].expand(5, -1, -1, -1),
    "channels_last": channels_last,
    "channels_last slice": lambda t: channels_last(t)[:, 2:6, 1:],
    "odd offset": lambda t: t.flatten()[1 : 1 + 5 * 8 * 7 * 9].view(5, 8, 7, 9),
    "one sample": lambda t: t[:1],
    "one channel": lambda t: t[:, :1],
    "one row": lambda t: t[:, :, :1],
}  # fmt: skip


@pytest.mark.parametrize("noise", [0.0, 0.7])
@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("kind", "groups", "ndim"),
    [("batch", 0, 0), ("layer", 0, 2), ("group", 2, 0), ("instance", 0, 0)],
)
def test_views_give_what_the_definition_gives(view, kind, groups, ndim, noise):
    x = VIEWS[view](torch.randn(6, 8, 8, 9, dtype=torch.float64).exp())
    if kind == "group" and x.size(1) % groups:
        groups = 1
    if kind == "batch" and x.size(0) * x[0, 0].numel() == 1:
        return
    case = Case(kind, tuple(x.shape), num_groups=groups, normalized_ndim=ndim)
    _assert_agree(case, x, noise_train=noise, channels_last=False)
    _assert_agree(case, x, noise_train=noise, channels_last=True)


def test_upstream_gradients_of_any_strides_and_statistics_of_any():
    case = Case("batch", (6, 8, 8, 9))
    x = torch.randn(case.shape, dtype=torch.float64).exp()
    g = torch.randn(9, 8, 8, 6, dtype=torch.float64).permute(3, 1, 2, 0)
    stats = _forward("cuda", case, x)[1]
    strided = torch.stack([stats, stats], 2)[:, :, 1]
    for given in (g, g[:1, :, :1].expand(case.shape)):
        want = _backward("reference", case, given, x, stats)
        for kept in (stats, strided):
            got = _backward("cuda", case, given, x, kept)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=_name)
def test_parameters_that_are_not_dense_or_begin_anywhere(dtype):
    case = Case("layer", (6, 64), normalized_ndim=1)
    x = draw(case, "exponential", 1, dtype)
    weight, bias = draw_parameters(case, 1, dtype)
    g = torch.randn(case.shape).to(dtype)
    results = []
    for place in (
        lambda t: t,
        lambda t: torch.stack([t, t], 1)[:, 1],
        lambda t: torch.cat([t[:1], t])[1:],
    ):
        w, b = place(weight), place(bias)
        y, stats = _forward("cuda", case, x, w, b)
        results.append((y, *_backward("cuda", case, g, x, stats, w, b)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=4 * oracle.UNIT[dtype], atol=1e-4)


@pytest.mark.parametrize(
    ("case", "frozen"),
    [
        (Case("batch", (0, 3, 4)), False),
        (Case("batch", (0, 3, 4)), True),
        (Case("layer", (0, 5), normalized_ndim=1), False),
        (Case("layer", (3, 0), normalized_ndim=1), False),
        (Case("group", (0, 4, 3), num_groups=2), False),
        (Case("instance", (2, 0, 5)), False),
    ],
    ids=str,
)
def test_empty_inputs(case, frozen):
    x = torch.empty(case.shape)
    weight = torch.ones(case.parameter_shape)
    running = [torch.ones(case.shape[1])] * 3 if frozen else NONE
    y, stats = _forward("cuda", case, x, weight, weight, running, noise_train=0.5)
    assert y.shape == x.shape
    assert stats.shape == (len(Row), case.groups)
    du, dw, db = _backward("cuda", case, x, x, stats, weight, weight, noise_train=0.5)
    assert du.shape == x.shape
    assert torch.equal(dw, torch.zeros_like(weight))
    assert torch.equal(db, torch.zeros_like(weight))


def test_without_gradients_no_kernel_is_launched():
    case = Case("batch", (6, 4))
    x = torch.full(case.shape, torch.nan)
    stats = torch.empty(len(Row), 4)
    config = case.config("cuda")
    found = OPS.normal_norm_backward(
        x, x, stats, None, None, None, None, None, False, False, False, False, *config
    )
    assert [t.numel() for t in found] == [0, 0, 0]


@pytest.mark.parametrize(
    ("first", "second"), list(itertools.permutations(("reference", "cpu", "cuda"), 2))
)
@each_dtype
def test_one_backends_backward_follows_anothers_forward(first, second, dtype):
    for case in CASES:
        for last in (False, True)[: 1 + (len(case.shape) > 3)]:
            x = draw(case, "lognormal", 1, dtype)
            x = channels_last(x) if last else x
            weight, bias = draw_parameters(case, 1, dtype)
            g = torch.randn(case.shape).to(dtype)
            options = {"noise_train": 0.8, "channels_last": last}
            y, stats = _forward(first, case, x, weight, bias, **options)
            gradients = _backward(second, case, g, x, stats, weight, bias, **options)
            arguments = tuple(oracle.to_numpy(a) for a in (x, g, weight, bias))
            options = {"noise_train": 0.8, "z": oracle.normals(case.shape, 5, channels_last=last)}
            exact = oracle.run(case, *arguments, **options)
            allowed = oracle.bounds(case, exact, *arguments, dtype=dtype, **options)
            for name, got in zip(("y", "du", "dweight", "dbias"), (y, *gradients), strict=True):
                oracle.assert_within(got, exact[name], allowed[name], f"{case} {name}")


@pytest.mark.parametrize("case", [c for c in DEEP if c.kind == "layer"], ids=str)
def test_noise_in_an_order_without_a_layout_falls_back_to_the_reference(case):
    """The same bits as the reference."""
    x = channels_last(draw(case, "exponential", 1, torch.float32))
    options = {"noise_train": 0.7, "channels_last": True}
    both = [_forward(name, case, x, **options) for name in ("cuda", "reference")]
    assert all(map(torch.equal, *both))
    weight = torch.rand(case.parameter_shape)
    both = [
        _backward(name, case, x, x, both[0][1], weight, **options) for name in ("cuda", "reference")
    ]
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


def test_the_fold_raises_version_counters_and_keeps_values_at_momentum_0():
    stats = torch.rand(len(Row), 4).add_(0.5)
    running = [torch.rand(4) for _ in range(3)]
    tracked = torch.tensor(3)
    before = [t.clone() for t in running]
    versions = [t._version for t in (*running, tracked)]
    OPS.fold_running_(stats, *running, tracked, 0.0, 40, 1e-5, "cuda")
    assert all(map(torch.equal, running, before))
    assert tracked.item() == 4
    assert all(t._version > v for t, v in zip((*running, tracked), versions, strict=True))


@pytest.mark.parametrize("name", ["reference", "cpu", "cuda"])
def test_the_fold_refuses_buffers_that_share_their_memory(name):
    stats, running = torch.rand(len(Row), 4).add_(0.5), torch.rand(4)
    others = torch.rand(4), torch.rand(4)
    for buffers in ((running, running, others[0]), (others[0], running, running)):
        with pytest.raises(ValueError, match="must be three buffers"):
            OPS.fold_running_(stats, *buffers, None, 0.1, 40, 1e-5, name)
    one = torch.rand(1).expand(4)
    with pytest.raises(ValueError, match="running_var must have memory for each channel"):
        OPS.fold_running_(stats, running, one, others[0], None, 0.1, 40, 1e-5, name)


def test_a_graph_that_saved_a_buffer_refuses_to_go_backward():
    layer = normnorm.BatchNormalNorm1d(4)
    x = torch.randn(8, 4)
    with normnorm.use_backend("cuda"):
        held = (x.requires_grad_() * layer.running_mean).sum()
        layer(x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        held.backward()


# --- errors, compilers, gradients -----------------------------------------------------------------


def test_wrong_arguments_are_refused_by_a_sentence():
    case = Case("batch", (6, 4, 3))
    x, half = torch.randn(case.shape), torch.ones(4).half()
    wrong = {
        "weight must have shape (4,)": lambda: _forward("cuda", case, x, torch.ones(5)),
        "weight must have the input's dtype": lambda: _forward("cuda", case, x, half),
        "input must be float64, float32": lambda: _forward("cuda", case, x.int()),
        "noise_scale must be torch.float32": lambda: _forward(
            "cuda", case, x, scale=torch.ones(4).double(), noise_train=0.5
        ),
        "running_mean must have shape (4,)": lambda: _forward(
            "cuda", case, x, running=[torch.ones(3)] * 3
        ),
        "eps must be positive": lambda: _forward("cuda", case, x, eps=0.0),
        "order must be 1 or 2": lambda: _forward("cuda", case, x, order=3),
        "stats must have shape (8, 4)": lambda: _backward("cuda", case, x, x, torch.ones(8, 5)),
        "grad_output must have the input's shape": lambda: _backward(
            "cuda", case, x[:1], x, torch.ones(8, 4)
        ),
        "stats must hold a multiple": lambda: OPS.fold_running_(
            torch.ones(8, 5), *[torch.ones(4) for _ in range(3)], None, 0.1, 10, 1e-5, "cuda"
        ),
    }
    for words, call in wrong.items():
        with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
            call()
        assert words in str(caught.value)


def test_tensors_of_a_device_that_it_does_not_serve_are_refused():
    mixed = (torch.ones(len(Row), 4), torch.ones(4), torch.ones(4, device="meta"), torch.ones(4))
    with pytest.raises(ValueError, match="must be on the statistics' device"):
        OPS.fold_running_(*mixed, None, 0.1, 10, 1e-5, "cuda")
    case = Case("layer", (3, 4), normalized_ndim=1)
    with pytest.raises(ValueError, match="weight must be on the input's device"):
        _forward("cuda", case, torch.ones(3, 4), torch.ones(4, device="meta"))


@pytest.mark.parametrize("case", selfcheck.CASES[::2], ids=lambda c: c.layer)
def test_gradients_agree_with_finite_differences(case):
    assert selfcheck.finite_differences(case, "cuda", "cpu")


@pytest.mark.parametrize("noise", [0.0, 0.5])
@pytest.mark.parametrize("case", [CASES[0], CASES[4], *LAYER_LAST], ids=str)
def test_the_ops_keep_their_promises_to_compilers(case, noise):
    x = channels_last(draw(case, "exponential", 1, torch.float32))
    weight, bias = draw_parameters(case, 1, torch.float32)
    seed = torch.tensor([5]) if noise else None
    config = case.config("cuda", noise_train=noise)
    forward = (x.requires_grad_(), *NONE, weight, bias, None, seed, None, False, True, *config)
    torch.library.opcheck(OPS.normal_norm_forward.default, forward)
    stats = OPS.normal_norm_forward(*forward)[1]
    backward = (x.detach(), x.detach(), stats, weight, bias, None, seed, None)
    needs = (True, True, True, False)
    torch.library.opcheck(OPS.normal_norm_backward.default, (*backward, *needs, *config))


def test_a_compiled_layer_gives_what_it_gives_eagerly():
    layer = normnorm.BatchNormalNorm2d(4, noise_train=0.0)
    x = torch.randn(3, 4, 5, 5)
    with normnorm.use_backend("cuda"):
        eager = layer(x)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), eager)
    assert layer.num_batches_tracked.item() == 2


# --- everything that runs on every backend --------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("file", ["backends", "ops", "noise", "numerics", "bad_input", "fused"])
def test_the_tests_of_all_backends_pass_on_this_one(file):
    paths = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", ""))
    environment = os.environ | {
        "NORMNORM_HOST_RUN": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))
    }  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "cuda"]
    done = subprocess.run(
        [*command, "-m", "not slow", str(Path(__file__).parents[1] / f"core/test_{file}.py")],
        env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout
