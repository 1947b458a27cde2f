"""The Triton kernels in Triton's interpreter, on CPU tensors: numbers, noise, strides, gradients.

The interpreter computes with NumPy. It shows nothing of a GPU's special-function instructions,
races or memory accesses; ``make gpu-check`` does.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import raw_ops
import test_golden
import torch
from oracle import CASES, Case, check, draw, draw_parameters, noise_words, normals
from raw_ops import backward_pass, both_passes, channels_last, forward_pass, operands
from shards import sharded_passes
from triton_tools.interpreter import interpreted, missing

import normnorm
from normnorm import backends
from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
PATHS = ("resident", "streaming", "streaming, partial sums reduced")
# Groups that tiles do not fit evenly, in one or several runs, on a multiple of four or not.
ODD = (
    Case("batch", (21, 3, 7, 7)), Case("batch", (70, 6)),
    Case("layer", (3, 333), normalized_ndim=1), Case("layer", (5, 768), normalized_ndim=1),
    Case("group", (2, 6, 9, 9), num_groups=2), Case("group", (2, 12), num_groups=3),
    Case("instance", (2, 3, 13, 13)),
)  # fmt: skip
# Few programs, weights that belong to all that a weight can.
SMALL = (
    Case("batch", (3, 2, 3, 5)), Case("layer", (2, 23), normalized_ndim=1),
    Case("group", (1, 4, 3, 3), num_groups=2), Case("instance", (1, 2, 3, 5)),
)  # fmt: skip


@contextmanager
def path(name: str) -> Iterator[None]:
    """Groups held in registers or not, whatever their size; with small tiles, so that several
    programs share a group of more than 512 elements."""
    from normnorm.triton_kernels import plan

    before = {n: getattr(plan, n) for n in dir(plan) if n.isupper()}
    if name != "resident":
        plan.FORWARD_HELD = plan.BACKWARD_HELD = 0
        plan.STREAM_WARPS = 1
        plan.PERSISTENT_WARPS = 6  # the interpreter's time is the number of programs
    if name == PATHS[2]:
        plan.REDUCED_ABOVE = 0
    plan._plans.clear()
    try:
        with normnorm.use_backend("triton"):
            yield
    finally:
        for n, value in before.items():
            setattr(plan, n, value)
        plan._plans.clear()


# --- forward and backward against the oracle -----------------------------------------------------


RESIDENT, STREAMING, REDUCED = PATHS
LAST = [
    next(c for c in CASES if c.kind == kind and len(c.shape) == 4)
    for kind in ("batch", "group", "instance")
]
LAWS = Case("batch", (9, 3, 4, 4))
WITHIN = [
    *((case, "exponential", RESIDENT, DTYPES[i % 4], False) for i, case in enumerate(CASES)),
    *((case, "normal", how, torch.float32, True) for case in LAST for how in PATHS),
    *((case, "exponential", how, torch.float32, False) for case in ODD for how in PATHS[:2]),
    (ODD[1], "exponential", REDUCED, torch.float32, False),
    *((LAWS, law, RESIDENT, torch.float32, False) for law in ("relu", "lognormal")),
    *((LAWS, law, how, torch.float32, False) for law in ("one_hot", "outlier", "offset")
      for how in PATHS[:2]),
]  # fmt: skip


@pytest.mark.parametrize(("case", "law", "how", "dtype", "last"), WITHIN, ids=str)
@interpreted
def test_forward_and_backward_are_within_bounds(case, law, how, dtype, last):
    """Every kind and dtype, groups that no tile fits, values that are hard on numbers."""
    x = draw(case, law, 3, dtype)
    weight, bias = draw_parameters(case, 3, dtype)
    with path(how):
        x = channels_last(x) if last else x
        check(case, x, weight, bias, seed=5, noise_train=0.4, channels_last=last)


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"alpha": 0.0}, {"alpha": 0.5}, {"transform_eps": math.sqrt(1e-5)}]
)
@interpreted
def test_every_option_of_the_estimate_and_of_the_transform(options):
    case = Case("layer", (4, 64), normalized_ndim=1)
    with path("resident"):
        x = draw(case, "exponential", 7, torch.float32)
        check(case, x, *draw_parameters(case, 7, torch.float32), noise_train=0.0, **options)


# --- the authors' vectors ------------------------------------------------------------------------

_FAST_GOLDEN = {kind: name for name, case in test_golden.CASES.items() for kind in [case["cls"]]}
GOLDEN = [
    pytest.param(name, marks=() if name in _FAST_GOLDEN.values() else pytest.mark.slow)
    for name in test_golden.CASES
]


@pytest.mark.parametrize("name", GOLDEN)
@interpreted
def test_outputs_gradients_and_running_statistics_are_the_authors(name):
    with path("resident"):
        test_golden._check_case(test_golden.Recorded(name, "cpu"))


# --- noise ---------------------------------------------------------------------------------------


@interpreted
def test_noise_words_are_bitwise_those_of_the_definition():
    from triton_tools import kernels

    from normnorm.noise import philox_words

    for value, stream in ((0, 0), (2024, 3), (-1, 0), (2**62 + 12345, 2**31 - 1)):
        seed = torch.tensor([value])
        for octets, wide in ((torch.arange(64), False), (2**32 - 32 + torch.arange(64), True)):
            out = torch.zeros(5, 64, dtype=torch.int64)
            kernels.words[(1,)](seed, octets, out, stream, 64, wide)
            assert not out[0].any(), "tl.philox says otherwise"
            want = torch.stack(philox_words(octets, seed, stream))
            assert torch.equal(out[1:], want)
            again = noise_words(64, value, stream, int(octets[0])).T
            assert np.array_equal(out[1:].numpy(), again)


@pytest.mark.parametrize("how", PATHS[:2])
@pytest.mark.parametrize(
    ("case", "last"),
    [
        (Case("batch", (6, 4, 5, 5)), True), (Case("batch", (10, 6)), False),
        (Case("layer", (4, 39), normalized_ndim=1), False),
        (Case("group", (2, 6, 3, 5), num_groups=2), False),
        (Case("group", (2, 6, 3, 5), num_groups=2), True), (Case("instance", (2, 3, 7, 5)), False),
    ],
)  # fmt: skip
@interpreted
def test_noise_is_the_definitions_in_either_order_and_wherever_runs_begin(case, last, how):
    """y without noise is x; with noise s z is added."""
    x = draw(case, "normal", 1, torch.float64)
    if last:
        x = channels_last(x)
    with path(how):
        y, stats, _ = forward_pass("triton", case, {"x": x}, last=last, noise_train=1.0, stream=5)
        plain, _, _ = forward_pass("triton", case, {"x": x}, last=last)
    scale = case.ungroup(stats[Row.NOISE_SCALE].numpy()[:, None].repeat(case.size, 1))
    z = (y - plain).numpy() / scale
    assert np.abs(z - normals(case.shape, 77, 5, channels_last=last)).max() < 1e-9


@interpreted
def test_a_given_noise_scale_takes_the_place_of_the_deviation():
    case, given = Case("batch", (8, 4, 5, 5)), torch.rand(4) + 0.5
    for how in PATHS[:2]:
        with path(how):
            _, stats, *_ = raw_ops.check(
                "triton", case, operands(case), noise_scale=given, noise_train=0.4
            )
            assert torch.equal(stats[Row.NOISE_SCALE], given)


# --- gradients asked for, given statistics, running statistics -----------------------------------


@pytest.mark.parametrize("how", PATHS[:2])
@pytest.mark.parametrize("case", SMALL[:3], ids=str)
@interpreted
def test_only_the_gradients_asked_for_are_made(case, how):
    t = operands(case)
    fused = ("sum", "relu") if case.kind == "layer" else ()
    with path(how):
        saved = forward_pass("triton", case, t, fused, noise_train=0.4)
        full = backward_pass("triton", case, t, saved, fused, noise_train=0.4)
        for wanted in range(3):
            needs = [i == wanted for i in range(3)]
            found = backward_pass("triton", case, t, saved, fused, needs=needs, noise_train=0.4)
            for needed, a, b in zip(needs, found, full, strict=True):
                if needed:
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
                else:
                    assert a.numel() == 0


@pytest.mark.parametrize(
    ("dtype", "last", "fused"),
    [
        (torch.float32, False, ("residual", "relu")),
        (torch.bfloat16, True, ()),
        (torch.float64, True, ("residual", "relu")),
    ],
)
@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_given_statistics_and_inference(dtype, last, fused, how):
    case = Case("batch", (3, 5, 4, 4))
    t = operands(case, dtype, last)
    lmbda = torch.tensor([1e-4, 1.9999, 1.0, 3.0, -1.5])  # two of them take the series path
    running = (torch.randn(5), torch.rand(5) + 0.5, lmbda)
    with path(how):
        y, *_ = raw_ops.check("triton", case, t, fused, last, running=running)
        config = case.config("", channels_last=last, activation="relu" if fused else "")
        given = raw_ops.forward(
            config[:-1], t["x"], t["weight"], t["bias"], running=running,
            residual=t["residual"] if fused else None, keep_stats=False,
        )  # fmt: skip
        assert torch.equal(backends.get("triton").forward(*given)[0], y)
        infinite = (running[0], torch.full((5,), math.inf), lmbda)
        y, *_ = forward_pass("triton", case, t, (), last, running=infinite)
        assert y.isnan().all()


@pytest.mark.parametrize("momentum", [0.1, None])
@interpreted
def test_folding_is_the_definitions_to_the_bit(momentum):
    for dtype, groups in ((torch.float32, 300), (torch.bfloat16, 100)):
        stats = torch.rand(8, groups) + 0.5
        ours, theirs = [], []
        for name, kept in (("triton", ours), ("reference", theirs)):
            buffers = [torch.full((100,), 0.25, dtype=dtype) for _ in range(3)]
            tracked = torch.tensor(3)
            backends.get(name).fold(stats, *buffers, tracked, momentum, 48, 1e-5)
            kept += [*buffers, tracked]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


# --- fused residual, activation and sum ----------------------------------------------------------

SMALL_PATHS = [
    pytest.param(case, last, how, id=f"{case}{'-channels_last' * last}-{how}")
    for case in SMALL
    for last in ((False,) if case.kind == "layer" else (False, True))
    for how in PATHS[:2]
]
FUSED = (("residual", "relu"), ("sum", "relu"))


@pytest.mark.parametrize(("case", "last", "how"), SMALL_PATHS)
@interpreted
def test_fused_passes_equal_separate_ones_to_the_bit(case, last, how):
    with path(how):
        raw_ops.assert_fused_equals_steps(
            "triton", case, operands(case, last=last), last, noise_train=0.4
        )


@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_an_output_that_is_nan_stays_nan(how):
    case = SMALL[1]
    t = operands(case)
    t["residual"][0, 3] = math.nan
    with path(how):
        y, _, du, *_ = both_passes("triton", case, t, FUSED[0])
        assert y.isnan().nonzero().tolist() == [[0, 3]]
        masked = both_passes("triton", case, {**t, "g": torch.where(y <= 0, 0.0, t["g"])})
        assert torch.equal(du, masked[2])
        y, *_ = forward_pass("triton", case, t, ("sum", "relu"))
        assert y.isnan().all(1).tolist() == [True, False]


OTHER_STRIDES = {
    "permuted": lambda t: t.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2),
    "of a larger tensor": lambda t: torch.nn.functional.pad(t, (1, 1, 0, 0, 1, 0))[:, 1:, :, 1:-1],
    "one sample for all": lambda t: t[:1].expand(t.shape),
    "one sample for all, permuted": lambda t: OTHER_STRIDES["permuted"](t[:1]).expand(t.shape),
    "one number for all": lambda t: t[:1, :1, :1, :1].expand(t.shape),
}


@pytest.mark.parametrize("other", OTHER_STRIDES)
@interpreted
def test_every_operand_may_have_strides_of_its_own(other):
    layer = Case("layer", (2, 3, 2, 7), normalized_ndim=2)
    for case, last, fused in ((SMALL[0], True, FUSED[0]), (layer, False, FUSED[1])):
        t = operands(case, last=last)
        for name in ("residual", "g", "grad_sum"):
            t[name] = OTHER_STRIDES[other](t[name])
        mask = OTHER_STRIDES[other](t["x"])
        with path("resident"):
            raw_ops.check("triton", case, t, fused, last, mask=mask)


@pytest.mark.parametrize("case", SMALL, ids=str)
@interpreted
def test_forward_by_one_backend_and_backward_by_another(case):
    t = operands(case)
    others = [n for n in ("cpu", "reference") if normnorm.available_backends()[n] is None]
    fused = FUSED[SMALL.index(case) % 2]
    for other in others:
        for first, second in (("triton", other), (other, "triton")):
            raw_ops.check(first, case, t, fused, backward=second, noise_train=0.4)


@interpreted
def test_empty_tensors_and_arguments_that_the_checks_refuse():
    case = Case("layer", (0, 3), normalized_ndim=1)
    t = {name: torch.empty(0, 3) for name in ("x", "residual", "g", "grad_sum")}
    t["weight"] = t["bias"] = torch.ones(3)
    y, _, du, _, _ = both_passes("triton", case, t, ("sum", "relu"))
    assert y.shape == du.shape == (0, 3)
    case, x = Case("batch", (4, 3)), torch.randn(4, 3)
    with pytest.raises(ValueError, match="weight must have shape"):
        forward_pass("triton", case, {"x": x, "weight": torch.ones(4)})
    with pytest.raises(ValueError, match="residual must have the input's shape"):
        forward_pass("triton", case, {"x": x, "residual": x[:1]}, ("sum",))
    saved = forward_pass("triton", case, {"x": x}, ("relu",))
    with pytest.raises(TypeError, match="grad_output must have the input's dtype"):
        backward_pass("triton", case, {"x": x, "g": x.double()}, saved, ("relu",))


# --- synchronised layers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "view", "dtype", "sizes", "fused", "noise"),
    [
        (ODD[0], "contiguous", torch.float32, (9, 0, 12), FUSED[0], 0.0),
        (ODD[0], "channels_last", torch.bfloat16, (9, 0, 12), (), 0.0),
        (ODD[0], "transposed", torch.float16, (21,), FUSED[0], 0.4),
        (ODD[1], "contiguous", torch.float64, (70,), (), 0.4),
    ],
)
@interpreted
def test_rounds_over_shards_give_what_the_whole_batch_gives(case, view, dtype, sizes, fused, noise):
    last = view == "channels_last"
    t = operands(case, dtype, last)
    if view == "transposed":  # no layout has these strides
        t["x"] = t["x"].mT.contiguous().mT
    with path(STREAMING):
        got = sharded_passes("triton", case, t, sizes, fused, last, noise_train=noise, stream=5)
    raw_ops.compare(case, t, fused, last, got, noise_train=noise, stream=5)


# --- strides, sizes, bad groups ------------------------------------------------------------------

VIEWS = {
    "slice": lambda t: t[1::2, :, 1:-1, 2:],
    "channel slice": lambda t: t[:, 1:4],
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "expanded": lambda t: t[:, :, :1, :1].expand(-1, -1, 3, 4),
    "channels_last": channels_last,
    "channels_last slice": lambda t: channels_last(t)[:, 1:4, 1:],
    "channels_last samples": lambda t: channels_last(t)[1::2],
    "channels_last, one sample for all": lambda t: channels_last(t[:1]).expand(t.shape),
}


def case_of(kind: str, x: torch.Tensor) -> Case:
    groups = math.gcd(x.size(1), 3) if kind == "group" else 0
    return Case(kind, tuple(x.shape), groups, normalized_ndim=2 if kind == "layer" else 0)


@pytest.mark.parametrize("view", VIEWS)
@interpreted
def test_a_layout_reaches_every_element_of_a_view(view):
    """In the order of the contiguous copy, or says that it has no strides for the view."""
    from normnorm.triton_kernels.layout import _channel_layout, make_layout

    x = VIEWS[view](torch.arange(4 * 6 * 5 * 6).view(4, 6, 5, 6))

    def elements(layout: Any, tensor: torch.Tensor) -> torch.Tensor | None:
        strides = layout.strides(tensor)
        shape = (layout.outer, layout.inner, layout.runs, layout.length)
        return None if strides is None else tensor.as_strided(shape, (*strides, 1))

    found = 0
    for kind in ("batch", "layer", "group", "instance"):
        config = case_of(kind, x).config("triton")
        layouts = [make_layout(x, config, False)]
        if kind != "layer":
            layouts += [_channel_layout(x, config, last) for last in (False, True)]
        for layout in layouts:
            want = elements(layout, layout.dense(x))
            got = elements(layout, x)
            assert want is not None
            assert got is None or torch.equal(got, want)
            found += got is not None
    assert (found == 0) == (view in ("slice", "permuted", "expanded"))


@pytest.mark.parametrize(
    ("view", "kind"),
    [
        ("slice", "batch"), ("channel slice", "instance"), ("permuted", "layer"),
        ("expanded", "batch"), ("channels_last slice", "batch"),
        ("channels_last samples", "group"),
    ],
)  # fmt: skip
@interpreted
def test_a_view_gives_what_its_contiguous_copy_gives(view, kind):
    x = VIEWS[view](torch.randn(4, 6, 5, 6))
    case = case_of(kind, x)
    with path("resident"):
        got, want = (
            both_passes("triton", case, {**operands(case), "x": t}) for t in (x, x.contiguous())
        )
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[0].stride() == got[2].stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize(
    ("case", "how"), [(SMALL[0], PATHS[0]), (SMALL[1], PATHS[0]), (SMALL[2], PATHS[1])]
)
@interpreted
def test_offsets_beyond_31_bits_take_another_kernel_with_equal_results(case, how):
    from normnorm.triton_kernels import plan

    t = operands(case)
    with path(how):
        want = both_passes("triton", case, t, noise_train=0.4)
        plan._plans.clear()
        narrow, plan._is_wide = plan._is_wide, lambda *_: True
        try:
            got = both_passes("triton", case, t, noise_train=0.4)
        finally:
            plan._is_wide = narrow
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_a_bad_value_spoils_its_group_alone(how):
    case = Case("batch", (6, 4, 4, 4))
    # the square of the last is infinite
    for bad, last in ((math.nan, False), (math.inf, True), (1e20, False), (1e20, True)):
        t = operands(case, last=last)
        t["x"][2, 1, 0, 0] = bad
        with path(how):
            found = both_passes("triton", case, t, last=last)
        for tensor in (found[0], found[2]):
            assert tensor.isnan().sum((0, 2, 3)).tolist() == [0, 96, 0, 0]
        assert found[1].isnan().any(0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_a_constant_group_is_its_bias_exactly(how):
    case = Case("batch", (40, 4))
    t = {**operands(case), "x": torch.full(case.shape, 0.1)}
    with path(how):
        y, stats, _ = forward_pass("triton", case, t, noise_train=0.4)
    assert torch.equal(y, t["bias"].expand_as(y))
    assert (stats[Row.LMBDA] == 1).all()
    assert (stats[Row.NOISE_SCALE] == 0).all()


# --- the functions of math.py --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@interpreted
def test_psi_and_its_slopes_are_the_references(dtype):
    """For exponents around 0, where P - 1 cancels, and far from it."""
    from triton_tools import kernels

    from normnorm.reference import yeo_johnson

    lmbdas = torch.tensor(
        [-3.0, -0.3, -1e-3, 0.0, 1e-5, 0.1, 0.24, 0.26, 1.0, 1.75, 1.9, 2.0, 2.3, 5.0], dtype=dtype
    )
    h = torch.linspace(-12, 12, 256, dtype=dtype)
    out = torch.empty(len(lmbdas), 3, 256, dtype=dtype)
    kernels.slopes[(1,)](h, lmbdas, out, len(lmbdas), 256)
    tolerance = 3e-6 if dtype == torch.float32 else 1e-14
    for lmbda, got in zip(lmbdas.double(), out.double(), strict=True):
        h64 = h.double()
        x, psi_lmbda = torch.func.jvp(
            partial(yeo_johnson, h64), (lmbda,), (torch.ones_like(lmbda),)
        )
        _, psi_h = torch.func.jvp(
            partial(yeo_johnson, lmbda=lmbda), (h64,), (torch.ones_like(h64),)
        )
        wanted = (x, psi_h, psi_lmbda)
        for name, value, want in zip(("x", "psi_h", "psi_lmbda"), got, wanted, strict=True):
            # 4 ulp of l = log(1 + |h|), the loss of the plain path, in units of the slopes
            scale = (1 + want.abs()) * (1 + h64.abs().log1p())
            error = ((value - want).abs() / scale).max().item()
            assert error < tolerance, f"{name} at lambda {lmbda:.3g}: {error:.2g}"


# --- the plan ------------------------------------------------------------------------------------


@interpreted
def test_division_by_a_known_number_is_exact():
    from normnorm.triton_kernels import plan

    random = np.random.default_rng(0)
    for d in (*range(1, 70), 12544, 2**20 - 1, 2**29 + 1):
        factor, bits = plan._divisor(d)
        assert 0 < factor < 2**31
        n = np.concatenate([random.integers(0, 2**30, 500), np.arange(3 * 70), [2**30 - 1]])
        assert np.array_equal(((4 * n * factor) >> 32) >> bits, n // d)


@pytest.mark.parametrize("itemsize", [2, 4, 8])
@interpreted
def test_tiles_cover_every_group_within_what_a_thread_holds(itemsize):
    from normnorm.triton_kernels import plan as planning

    def check_tiles(tiles: Any, held: int, covered: int, needed: int) -> None:
        each = tiles.K * tiles.R * tiles.L / (32 * tiles.warps)
        assert tiles.K <= planning.LARGEST_K
        assert each <= max(1, planning._held(held, itemsize))
        assert covered >= needed

    for held in (planning.FORWARD_HELD, planning.BACKWARD_HELD):
        largest = 32 * planning.LARGEST_WARPS * planning._held(held, itemsize)
        for length in (*range(1, 130), 196, 768, 1000, 3136, 5120, 8192, 12544, 16384, 10**6):
            tiles = planning.row_tiles(length, 1000, itemsize, held)
            assert tiles is not None or length > largest / 2
            if tiles is not None:
                check_tiles(tiles, held, tiles.K * tiles.L, length)
            for runs in (2, 7, 256):
                tiles = planning.group_tiles(runs, length, True, itemsize, held)
                if tiles is not None:
                    chunks = runs * planning.ceil_div(length + 3, tiles.L)
                    check_tiles(tiles, held, tiles.K * tiles.R, chunks)
            tiles = planning.column_tiles(length, 100, itemsize, held)
            if tiles is not None:
                check_tiles(tiles, held, tiles.K * tiles.R, length)
            for columns in (False, True):
                tiles = planning.stream_tiles(columns, 64, 64, 256, length, True, itemsize)
                assert 32 * tiles.warps * 8 >= tiles.R * tiles.L
                assert 1 <= tiles.splits <= planning.LARGEST_COLUMN_SPLITS


@interpreted
def test_the_backend_says_what_it_is_and_serves_cpu_tensors_here():
    from normnorm.backends import triton as described

    assert described.device_type() == "cpu"
    assert described.info()["kernels"] == "interpreted on the host"
    assert normnorm.available_backends()["triton"] is None
    assert backends.resolve(torch.device("cpu"), "auto").name != "triton"
    with pytest.raises(RuntimeError, match="serves cpu tensors"):
        backends.resolve(torch.device("cuda"), "triton")


@interpreted
def test_layers_train_and_compile_without_graph_breaks():
    with path("resident"):
        layer = normnorm.BatchNormalNorm2d(4)
        plain = normnorm.BatchNormalNorm2d(4)
        x = torch.randn(3, 4, 5, 6)
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        for module, call in ((layer, compiled), (plain, plain)):
            torch.manual_seed(3)
            call(x).square().sum().backward()
            assert module.num_batches_tracked.item() == 1
        torch.testing.assert_close(layer.weight.grad, plain.weight.grad)
        torch.testing.assert_close(layer.running_lmbda, plain.running_lmbda)


def test_the_spec_of_a_kernel_is_hashable_and_prints_all_fields():
    """Triton caches compiled kernels by both."""
    from normnorm.triton_kernels.params import Spec

    spec = Spec(LAYOUT=1, R=2, L=64)
    assert hash(spec) == hash(replace(spec))
    assert repr(replace(spec, ALIGN=4)) != repr(spec)
