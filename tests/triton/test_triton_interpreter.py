"""The Triton kernels in Triton's interpreter, on CPU tensors: numbers, noise, strides, gradients.

The interpreter computes with NumPy. It says nothing about the special-function instructions,
races or layouts of a GPU: ``make gpu-check`` does, where there is one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import test_golden
import torch
from oracle import CASES, Case, check, draw, draw_parameters, noise_words, normals
from triton_tools.interpreter import interpreted, missing

import normnorm
from normnorm import backends
from normnorm.backends import reference
from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NONE = (None, None, None)
IMAGES = tuple(c for c in CASES if c.kind != "layer" and len(c.shape) > 3)
# Groups over which tiles do not fit evenly, in one or several runs, on a multiple of four or not.
ODD = (
    Case("batch", (21, 3, 7, 7)),
    Case("batch", (70, 6)),
    Case("layer", (3, 333), normalized_ndim=1),
    Case("layer", (5, 768), normalized_ndim=1),
    Case("group", (2, 6, 9, 9), num_groups=2),
    Case("group", (2, 12), num_groups=3),
    Case("instance", (2, 3, 13, 13)),
)
PATHS = ("resident", "streaming", "streaming, parts folded")


@contextmanager
def path(name: str) -> Iterator[None]:
    """Groups held in registers or not, whatever their size; several programs for each."""
    from normnorm.triton_kernels import plan

    before = {n: getattr(plan, n) for n in dir(plan) if n.isupper()}
    if name != "resident":
        plan.FORWARD_HELD = plan.BACKWARD_HELD = 0
        plan.PERSISTENT_WARPS = 24  # the interpreter's time is the number of programs
    if name == "streaming, parts folded":
        plan.REDUCED_ABOVE = 0
    plan._plans.clear()
    try:
        with normnorm.use_backend("triton"):
            yield
    finally:
        for n, value in before.items():
            setattr(plan, n, value)
        plan._plans.clear()


def forward_and_backward(
    x: torch.Tensor, case: Case, backend: str = "triton", last: bool = False, **options: Any
) -> tuple[torch.Tensor, ...]:
    """(y, stats, du, dw, db) of the raw ops."""
    ops = backends.get(backend)
    config = case.config(backend, channels_last=last, **{"noise_train": 0.4, **options})
    weight, bias = draw_parameters(case, 1, x.dtype)
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    seed = torch.tensor([77])
    y, stats = ops.forward(x, *NONE, weight, bias, None, seed, None, *config)
    gradients = ops.backward(
        g, x, stats, weight, bias, None, seed, True, True, True, False, *config
    )
    return (y, stats, *gradients)


def assert_close(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...], tolerance=1e-5):
    for name, a, b in zip(("y", "stats", "du", "dw", "db"), got, want, strict=True):
        scale = b.double().abs().max().item()
        error = (a.double() - b.double()).abs().max().item()
        assert error <= tolerance * scale, f"{name} off by {error:.2g} of {scale:.2g}"


# --- forward and backward against the oracle -----------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@interpreted
def test_forward_and_backward_are_within_bounds(case, dtype):
    with path("resident"):
        x = draw(case, "exponential", 3, dtype)
        weight, bias = draw_parameters(case, 3, dtype)
        check(case, x, weight, bias, seed=5, noise_train=0.4)


@pytest.mark.parametrize("how", PATHS)
@pytest.mark.parametrize("case", IMAGES, ids=str)
@interpreted
def test_channels_last_is_within_bounds(case, how):
    last = torch.channels_last if len(case.shape) == 4 else torch.channels_last_3d
    with path(how):
        x = draw(case, "normal", 4, torch.float32).to(memory_format=last)
        weight, bias = draw_parameters(case, 4, torch.float32)
        check(case, x, weight, bias, seed=6, noise_train=0.4, channels_last=True)


@pytest.mark.parametrize("noise_train", [0.0, 0.4])
@pytest.mark.parametrize("how", PATHS[:2])
@pytest.mark.parametrize("case", ODD, ids=str)
@interpreted
def test_groups_that_no_tile_fits(case, how, noise_train):
    with path(how):
        x = draw(case, "exponential", 5, torch.float32)
        weight, bias = draw_parameters(case, 5, torch.float32)
        check(case, x, weight, bias, seed=7, noise_train=noise_train)


@pytest.mark.parametrize("law", ["relu", "lognormal", "one_hot", "outlier", "offset", "constant"])
@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_laws_that_are_hard_on_numbers(law, how):
    with path(how):
        for case in (Case("batch", (9, 3, 4, 4)), Case("layer", (3, 96), normalized_ndim=1)):
            x = draw(case, law, 6, torch.float32)
            check(case, x, *draw_parameters(case, 6, torch.float32), seed=8, noise_train=0.4)


@pytest.mark.parametrize(
    "options", [{"order": 1}, {"alpha": 0.0}, {"alpha": 0.5}, {"transform_eps": math.sqrt(1e-5)}]
)
@interpreted
def test_every_option_of_the_estimate_and_of_the_transform(options):
    case = Case("layer", (4, 64), normalized_ndim=1)
    with path("resident"):
        for law in ("normal", "exponential"):
            x = draw(case, law, 7, torch.float32)
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
        for quads, wide in ((torch.arange(64), False), (2**32 - 32 + torch.arange(64), True)):
            out = torch.zeros(5, 64, dtype=torch.int64)
            kernels.words[(1,)](seed, quads, out, stream, 64, wide)
            assert not out[0].any(), "tl.philox says otherwise"
            want = torch.stack(philox_words(quads, seed, stream))
            assert torch.equal(out[1:], want)
            again = noise_words(4 * 64, value, stream, int(quads[0])).reshape(64, 4).T
            assert np.array_equal(out[1:].numpy(), again)


@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_noise_is_the_definitions_in_either_order_and_wherever_runs_begin(how):
    """x is all that is left of y without noise; what y has more is s times z."""
    for case in (
        Case("batch", (6, 4, 5, 5)),
        Case("batch", (10, 6)),
        Case("layer", (4, 39), normalized_ndim=1),
        Case("group", (2, 6, 3, 5), num_groups=2),
        Case("instance", (2, 3, 7, 5)),
    ):
        for last in (False, True):
            if last and (case.kind == "layer" or len(case.shape) < 3):
                continue
            x = draw(case, "normal", 1, torch.float64)
            if last:
                x = x.to(memory_format=torch.channels_last)
            config = case.config("triton", noise_train=1.0, channels_last=last, stream=5)
            seed = torch.tensor([99])
            with path(how):
                ops = backends.get("triton")
                y, stats = ops.forward(x, *NONE, None, None, None, seed, None, *config)
                quiet = case.config("triton", channels_last=last)
                plain, _ = ops.forward(x, *NONE, None, None, None, None, None, *quiet)
            scale = case.ungroup(stats[Row.NOISE_SCALE].numpy()[:, None].repeat(case.size, 1))
            z = (y - plain).numpy() / scale
            want = normals(case.shape, 99, 5, channels_last=last)
            assert np.abs(z - want).max() < 1e-9


@interpreted
def test_a_given_noise_scale_takes_the_place_of_the_deviation():
    case = Case("batch", (8, 4, 5, 5))
    x = draw(case, "normal", 2, torch.float32)
    given = torch.rand(4) + 0.5
    config = case.config("triton", noise_train=0.4)
    arguments = (x, *NONE, None, None, None, torch.tensor([3]), given)
    want, _ = reference.normal_norm_forward(*arguments, *config)
    for how in PATHS:
        with path(how):
            y, stats = backends.get("triton").forward(*arguments, *config)
            assert torch.equal(stats[Row.NOISE_SCALE], given)
            torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)


# --- mixing backends, flags, frozen layers -------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES if len(c.shape) in (2, 4)], ids=str)
@interpreted
def test_forward_by_one_backend_and_backward_by_another(case):
    last = case.kind != "layer" and len(case.shape) == 4
    x = draw(case, "exponential", 8, torch.float32)
    if last:
        x = x.to(memory_format=torch.channels_last)
    weight, bias = draw_parameters(case, 8, torch.float32)
    g, seed = torch.randn(x.shape), torch.tensor([4])
    results = []
    for first in ("triton", "cpu", "reference"):
        for second in ("triton", "cpu", "reference"):
            if normnorm.available_backends()["cpu"] is not None and "cpu" in (first, second):
                continue
            config = case.config("auto", noise_train=0.4, channels_last=last)
            y, stats = backends.get(first).forward(
                x, *NONE, weight, bias, None, seed, None, *config
            )
            gradients = backends.get(second).backward(
                g, x, stats, weight, bias, None, seed, True, True, True, False, *config
            )
            results.append((y, stats, *gradients))
    for other in results:
        assert_close(other, results[-1])


@pytest.mark.parametrize("how", PATHS[:2])
@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[9], CASES[12]], ids=str)
@interpreted
def test_only_the_gradients_asked_for_are_made(case, how):
    x = draw(case, "normal", 9, torch.float32)
    config = case.config("triton", noise_train=0.4)
    weight, bias = draw_parameters(case, 9, torch.float32)
    g, seed = torch.randn(x.shape), torch.tensor([4])
    with path(how):
        ops = backends.get("triton")
        _, stats = ops.forward(x, *NONE, weight, bias, None, seed, None, *config)
        arguments = (g, x, stats, weight, bias, None, seed)
        all_three = ops.backward(*arguments, True, True, True, False, *config)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            found = ops.backward(*arguments, *needs, False, *config)
            for wanted, got, full in zip(needs, found, all_three, strict=True):
                if wanted:
                    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-6)
                else:
                    assert got.numel() == 0


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@interpreted
def test_frozen_layers_and_inference(dtype, last):
    case = Case("batch", (3, 5, 4, 4))
    x = draw(case, "exponential", 1, dtype)
    if last:
        x = x.to(memory_format=torch.channels_last)
    running = (torch.randn(5), torch.rand(5) + 0.5, 1 + 2 * torch.randn(5))
    weight, bias = draw_parameters(case, 1, dtype)
    config = case.config("triton", channels_last=last)
    infer = (*config[:4], *config[5:8], *config[10:])
    g = torch.randn(x.shape).to(dtype)
    found, wanted = [], []
    for name, kept, to in (("triton", found, dtype), ("reference", wanted, torch.float64)):
        ops = backends.get(name)
        tensors = tuple(t.to(to) for t in (x, weight, bias, g))
        given = tuple(t.double() if to == torch.float64 else t for t in running)
        y, stats = ops.forward(
            tensors[0], *given, *tensors[1:3], None, None, None, *config
        )  # fmt: skip
        gradients = ops.backward(
            tensors[3], tensors[0], stats, *tensors[1:3], None, None, True, True, True, True,
            *config,
        )  # fmt: skip
        kept += [y, stats, *gradients, ops.infer(tensors[0], *NONE, *tensors[1:3], None, *infer)]
        again = ops.infer(tensors[0], *given, *tensors[1:3], None, *infer)
        assert torch.equal(again, y)
    infinite = torch.full((5,), math.inf)
    ops = backends.get("triton")
    assert ops.infer(x, running[0], infinite, running[2], weight, bias, None, *infer).isnan().all()
    unit = torch.finfo(dtype).eps
    for got, want in zip(found, wanted, strict=True):
        scale = want.abs().max()
        assert ((got.double() - want).abs().max() / scale).item() < 4 * unit + 2e-6


@pytest.mark.parametrize("momentum", [0.1, None])
@interpreted
def test_folding_is_the_definitions_to_the_bit(momentum):
    for dtype, groups in ((torch.float32, 300), (torch.bfloat16, 100)):
        stats = torch.rand(8, groups) + 0.5
        ours, theirs = [], []
        for name, kept in (("triton", ours), ("reference", theirs)):
            buffers = [torch.full((100,), 0.25, dtype=dtype) for _ in range(3)]
            tracked = torch.tensor(3)
            backends.get(name).fold(stats, *buffers, tracked, momentum, 48, 1e-5, name)
            kept += [*buffers, tracked]
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


# --- residuals, activations and the residual stream's sum ----------------------------------------

# Few programs, tiles that groups do not fill, weights that belong to all that a weight can.
JOINED = (
    Case("batch", (3, 2, 3, 5)),
    Case("layer", (2, 23), normalized_ndim=1),
    Case("group", (1, 4, 3, 3), num_groups=2),
    Case("instance", (1, 2, 3, 5)),
)
JOINED_PATHS = [
    pytest.param(case, last, how, id=f"{case}{'-channels_last' * last}-{how}")
    for case in JOINED
    for last in ((False,) if case.kind == "layer" else (False, True))
    for how in PATHS[:2]
]
JOINS = ((), ("residual",), ("relu",), ("residual", "relu"), ("sum",), ("sum", "relu"))
MOST_JOINED = (("residual", "relu"), ("sum", "relu"))


def operands(case: Case, dtype: torch.dtype, last: bool = False) -> dict[str, torch.Tensor]:
    """Tensors for a forward and a backward pass."""
    weight, bias = draw_parameters(case, 2, dtype)
    found = {"weight": weight, "bias": bias}
    for seed, name in enumerate(("x", "residual", "g", "grad_sum")):
        found[name] = draw(case, "normal", 40 + seed, dtype)
        if last:
            found[name] = found[name].to(memory_format=torch.channels_last)
    return found


def joined_pass(
    backend: str, case: Case, t: dict[str, torch.Tensor], joins: tuple[str, ...] = (),
    last: bool = False, mask: torch.Tensor | None = None, backward: str = "", **options: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """(y, stats, du, dw, db) of the raw ops, with whatever of residual, sum and relu it ``joins``;
    masked by ``mask`` in place of y, where given, and by the backend ``backward``."""
    relu = {"activation": "relu"} if "relu" in joins else {}
    config = case.config(backend, channels_last=last, **relu, **options)
    seed = torch.tensor([77]) if options.get("noise_train") else None
    parameters = (t["weight"], t["bias"])
    forward, back = backends.get(backend), backends.get(backward or backend)
    needs = (True, True, True)
    if "sum" in joins:
        y, total, stats = forward.add_forward(
            t["x"], t["residual"], *parameters, seed, None, *config
        )
        torch.testing.assert_close(total, t["x"] + t["residual"], rtol=0, atol=0, equal_nan=True)
        assert total.stride() == torch.empty_like(t["x"]).stride()
    else:
        residual = t["residual"] if "residual" in joins else None
        y, stats = forward.forward(t["x"], *NONE, *parameters, residual, seed, None, *config)
    result = (y if mask is None else mask) if relu else None
    tail = (stats, *parameters, result, seed, *needs)
    if "sum" in joins:
        gradients = back.add_backward(t["g"], t["grad_sum"], total, *tail, *config)
    else:
        gradients = back.backward(t["g"], t["x"], *tail, False, *config)
    return y, stats, *gradients


def exactly(t: dict[str, torch.Tensor], joins: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The operands in float64; what a pass normalizes is the sum as it is stored."""
    exact = {name: tensor.double() for name, tensor in t.items()}
    if "sum" in joins:
        exact["x"] = (t["x"] + t["residual"]).double()
        exact["residual"] = torch.zeros_like(exact["x"])
    return exact


@pytest.mark.parametrize(
    "every",
    [
        pytest.param(tuple(zip(MOST_JOINED, (0.4, 0.0), strict=True)), id="most"),
        pytest.param(
            [(joins, noise) for joins in JOINS for noise in (0.0, 0.4)],
            id="all",
            marks=pytest.mark.slow,
        ),
    ],
)
@pytest.mark.parametrize(("case", "last", "how"), JOINED_PATHS)
@interpreted
def test_whatever_a_pass_joins_is_within_bounds(case, last, how, every):
    """The masks of both are those of the output found here: a rounding may change a sign."""
    t = operands(case, torch.float32, last)
    for joins, noise_train in every:
        with path(how):
            got = joined_pass("triton", case, t, joins, last, noise_train=noise_train)
        want = joined_pass(
            "reference", case, exactly(t, joins), joins, last, got[0].double(),
            noise_train=noise_train,
        )  # fmt: skip
        assert_close(got, want)
        assert got[2].stride() == torch.empty_like(t["x"]).stride()
        assert (got[0] == 0).any() == ("relu" in joins)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_joined_passes_in_other_dtypes(how, dtype):
    for case, joins in zip(JOINED[:2], MOST_JOINED, strict=True):
        t = operands(case, dtype)
        with path(how):
            got = joined_pass("triton", case, t, joins)
        want = joined_pass("reference", case, exactly(t, joins), joins, mask=got[0].double())
        assert_close(got, want, 1e-12 if dtype == torch.float64 else torch.finfo(dtype).eps)


@pytest.mark.parametrize("how", PATHS[:2])
@pytest.mark.parametrize("case", JOINED, ids=str)
@interpreted
def test_joining_behind_is_what_it_would_be_apart_to_the_bit(case, how):
    """Adding and cutting off behind a pass, masking in front of its backward pass, where a NaN
    lets the gradient through."""
    t = operands(case, torch.float32)
    mask = torch.randint(-1, 2, case.shape, generator=torch.Generator().manual_seed(1)).float()
    mask.flatten()[::5] = math.nan
    masked = {**t, "g": torch.where(mask <= 0, 0.0, t["g"])}
    with path(how):
        got = joined_pass("triton", case, t, ("residual", "relu"), mask=mask)
        want = joined_pass("triton", case, masked)
    assert torch.equal(got[0], (want[0] + t["residual"]).relu())
    assert all(torch.equal(a, b) for a, b in zip(got[1:], want[1:], strict=True))


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_joining_in_front_is_what_it_would_be_apart_to_the_bit(how):
    for case, last in zip(JOINED[:3], (True, False, False), strict=True):
        t = operands(case, torch.bfloat16, last)
        with path(how):
            got = joined_pass("triton", case, t, ("sum",), last)
            want = joined_pass("triton", case, {**t, "x": t["x"] + t["residual"]}, last=last)
        for name, a, b in zip(("y", "stats", "du", "dw", "db"), got, want, strict=True):
            if name == "du":  # a rounding less
                unit = torch.finfo(torch.bfloat16).eps
                torch.testing.assert_close(a, b + t["grad_sum"], rtol=2 * unit, atol=unit)
            else:
                assert torch.equal(a, b), name


@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_an_output_that_is_not_a_number_stays_so(how):
    case = JOINED[1]
    t = operands(case, torch.float32)
    t["residual"][0, 3] = math.nan
    with path(how):
        y, _, du, *_ = joined_pass("triton", case, t, ("residual", "relu"))
        assert y.isnan().nonzero().tolist() == [[0, 3]]
        assert du.isfinite().all()
        y, *_ = joined_pass("triton", case, t, ("sum", "relu"))
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
def test_what_is_joined_may_have_other_strides_than_the_input(other):
    layer = Case("layer", (2, 3, 2, 7), normalized_ndim=2)
    for case, last, joins in (
        (JOINED[0], True, MOST_JOINED[0]),
        (layer, False, MOST_JOINED[1]),
        (JOINED[2], False, MOST_JOINED[0]),
    ):
        t = operands(case, torch.float32, last)
        for name in ("residual", "g", "grad_sum"):
            t[name] = OTHER_STRIDES[other](t[name])
        mask = OTHER_STRIDES[other](t["x"])
        with path("resident"):
            got = joined_pass("triton", case, t, joins, last, mask)
        alike = {name: tensor.contiguous() for name, tensor in t.items()}
        assert_close(got, joined_pass("reference", case, alike, joins, last, mask))


@pytest.mark.parametrize("case", JOINED, ids=str)
@interpreted
def test_joined_passes_of_different_backends_belong_together(case):
    t = operands(case, torch.float32)
    others = [n for n in ("cpu", "reference") if normnorm.available_backends()[n] is None]
    joins = MOST_JOINED[JOINED.index(case) % 2]
    pairs = [pair for other in others for pair in (("triton", other), (other, "triton"))]
    found = [
        joined_pass(first, case, t, joins, backward=second, noise_train=0.4)
        for first, second in pairs
    ]
    for other in found:
        assert_close(other, found[-1])


@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_frozen_layers_and_inference_join_as_well(how):
    case = JOINED[0]
    t = operands(case, torch.float32)
    running = (torch.randn(2), torch.rand(2) + 0.5, 1 + torch.randn(2))
    config = case.config("triton", activation="relu")
    infer = (*config[:4], *config[5:8], *config[10:])
    parameters = (t["weight"], t["bias"])
    found: dict[str, list[torch.Tensor]] = {}
    with path(how):
        for name in ("triton", "reference"):
            ops = backends.get(name)
            arguments = (t["x"], *running, *parameters, t["residual"])
            y, stats = ops.forward(*arguments, None, None, *config)
            mask = found["triton"][0] if found else y
            gradients = ops.backward(
                t["g"], t["x"], stats, *parameters, mask, None, True, True, True, True, *config
            )
            given = ops.infer(*arguments, *infer)
            own = ops.infer(t["x"], *NONE, *arguments[4:], *infer)
            found[name] = [y, *gradients, given, own]
    for got, want in zip(*found.values(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert torch.equal(found["triton"][0], found["triton"][4])


@pytest.mark.parametrize("how", PATHS[:2])
@interpreted
def test_an_adding_pass_makes_only_the_gradients_asked_for(how):
    case = JOINED[1]
    t = operands(case, torch.float32)
    config = case.config("triton", activation="relu")
    with path(how):
        ops = backends.get("triton")
        y, total, stats = ops.add_forward(
            t["x"], t["residual"], t["weight"], t["bias"], None, None, *config
        )
        arguments = (t["g"], t["grad_sum"], total, stats, t["weight"], t["bias"], y, None)
        all_three = ops.add_backward(*arguments, True, True, True, *config)
        for needs in ((True, False, False), (False, True, False), (False, False, True)):
            found = ops.add_backward(*arguments, *needs, *config)
            for wanted, got, full in zip(needs, found, all_three, strict=True):
                if wanted:
                    torch.testing.assert_close(got, full, rtol=1e-5, atol=1e-6)
                else:
                    assert got.numel() == 0


@interpreted
def test_joined_passes_over_nothing_and_over_what_does_not_fit():
    ops = backends.get("triton")
    case = Case("layer", (0, 3), normalized_ndim=1)
    config = case.config("triton", activation="relu")
    x = torch.empty(0, 3)
    y, total, stats = ops.add_forward(x, x, None, None, None, None, *config)
    assert y.shape == total.shape == x.shape
    gradients = ops.add_backward(x, x, x, stats, None, None, y, None, True, False, False, *config)
    assert gradients[0].shape == x.shape
    x, w = torch.randn(4, 3), torch.ones(3)
    with pytest.raises(ValueError, match="residual must have the input's shape"):
        ops.add_forward(x, x[:1], w, w, None, None, *config)
    with pytest.raises(TypeError, match="residual must be a tensor"):
        ops.add_forward(x, None, w, w, None, None, *config)
    _, total, stats = ops.add_forward(x, x, w, w, None, None, *config)
    with pytest.raises(ValueError, match="needs the forward's output"):
        ops.add_backward(x, x, total, stats, w, w, None, None, True, True, True, *config)
    with pytest.raises(TypeError, match="grad_sum must have the input's dtype"):
        ops.add_backward(x, x.double(), total, stats, w, w, x, None, True, True, True, *config)


# --- strides, sizes, bad groups ------------------------------------------------------------------

VIEWS = {
    "slice": lambda t: t[1::2, :, 1:-1, 2:],
    "channel slice": lambda t: t[:, 1:4],
    "permuted": lambda t: t.permute(3, 1, 0, 2),
    "expanded": lambda t: t[:, :, :1, :1].expand(-1, -1, 3, 4),
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "channels_last slice": lambda t: t.to(memory_format=torch.channels_last)[:, 1:4, 1:],
    "channels_last samples": lambda t: t.to(memory_format=torch.channels_last)[1::2],
    "channels_last, one sample for all": lambda t: (
        t[:1].to(memory_format=torch.channels_last).expand(t.shape)
    ),
    "empty": lambda t: t[:0],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("kind", ["batch", "layer", "group", "instance"])
@interpreted
def test_a_view_gives_what_its_contiguous_copy_gives(view, kind):
    x = VIEWS[view](torch.randn(4, 6, 5, 6))
    case = Case(
        kind, tuple(x.shape), num_groups=math.gcd(x.size(1), 3) if kind == "group" else 0,
        normalized_ndim=2 if kind == "layer" else 0,
    )  # fmt: skip
    got, want = (forward_and_backward(t, case, noise_train=0.0) for t in (x, x.contiguous()))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert got[0].stride() == got[2].stride() == torch.empty_like(x).stride()


@interpreted
def test_gradients_may_have_other_strides_than_the_input():
    case = Case("batch", (4, 6, 5, 6))
    x, g = torch.randn(case.shape), torch.randn(4, 5, 6, 6).permute(0, 3, 1, 2)
    config = case.config("triton", noise_train=0.4)
    ops = backends.get("triton")
    seed = torch.tensor([1])
    for last in (False, True):
        config = case.config("triton", noise_train=0.4, channels_last=last)
        _, stats = ops.forward(x, *NONE, None, None, None, seed, None, *config)
        both = [
            ops.backward(t, x, stats, None, None, None, seed, True, False, False, False, *config)[0]
            for t in (g, g.contiguous())
        ]
        torch.testing.assert_close(*both, rtol=1e-6, atol=1e-6)


@interpreted
def test_offsets_beyond_31_bits_take_another_kernel_with_equal_results():
    from normnorm.triton_kernels import plan

    cases = [Case("batch", (9, 3, 4, 4)), Case("layer", (5, 40), normalized_ndim=1), CASES[0]]
    narrow = plan._is_wide
    for how in PATHS[:2]:
        for case in cases:
            x = draw(case, "normal", 1, torch.float32)
            with path(how):
                want = forward_and_backward(x, case)
                plan._plans.clear()
                plan._is_wide = lambda *_: True
                try:
                    got = forward_and_backward(x, case)
                finally:
                    plan._is_wide = narrow
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_a_bad_value_spoils_its_group_alone(how):
    case = Case("batch", (6, 4, 4, 4))
    for bad in (float("nan"), float("inf"), 1e20):  # of the last the square is infinite
        for last in (False, True):
            x = draw(case, "normal", 3, torch.float32)
            x[2, 1, 0, 0] = bad
            if last:
                x = x.to(memory_format=torch.channels_last)
            with path(how):
                found = forward_and_backward(x, case, last=last)
            for tensor in (found[0], found[2]):
                spoilt = tensor.isnan().sum((0, 2, 3))
                assert spoilt.tolist() == [0, 96, 0, 0]
            assert found[1].isnan().any(0).tolist() == [False, True, False, False]


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_a_constant_group_is_its_bias_exactly(how):
    case = Case("batch", (40, 4))
    with path(how):
        y, stats, *_ = forward_and_backward(torch.full(case.shape, 0.1), case)
    _, bias = draw_parameters(case, 1, torch.float32)
    assert torch.equal(y, bias.expand_as(y))
    assert (stats[Row.LMBDA] == 1).all()
    assert (stats[Row.NOISE_SCALE] == 0).all()


@pytest.mark.parametrize("how", PATHS)
@interpreted
def test_equal_inputs_give_equal_bits(how):
    case = Case("group", (3, 6, 7, 5), num_groups=2)
    x = draw(case, "normal", 3, torch.float32)
    with path(how):
        first, second = (forward_and_backward(x, case) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- the functions of core.py --------------------------------------------------------------------


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
            # 4 ulp of l = log(1 + |h|), which the plain form may lose, in units of the slopes
            scale = (1 + want.abs()) * (1 + h64.abs().log1p())
            error = ((value - want).abs() / scale).max().item()
            assert error < tolerance, f"{name} at lambda {lmbda:.3g}: {error:.2g}"


@interpreted
def test_the_weight_of_lambda_is_its_derivative():
    from triton_tools import kernels

    from normnorm.reference import lmbda_newton_step

    alpha = torch.tensor(0.7, dtype=torch.float64)
    h = torch.randn(64, dtype=torch.float64).exp().requires_grad_()
    with torch.no_grad():
        h.sub_(h.mean()).div_(h.std(correction=0))
    for order in (1, 2):
        lmbda, slope, shift, q = lmbda_newton_step(h, (0,), 1e-5, 0.7, order)
        (want,) = torch.autograd.grad(lmbda.sum(), h, retain_graph=True)
        out = torch.empty(64, dtype=torch.float64)
        with torch.no_grad():
            kernels.weights[(1,)](h.detach(), lmbda, slope, shift, q, alpha, out, 64, order)
        # the estimate takes mean(h^2) as known, which in the layer it is: 3 mean(h^2) is left out
        torch.testing.assert_close(out / 64, want, rtol=1e-8, atol=1e-10)


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


@interpreted
def test_every_group_is_covered_by_its_tiles():
    """Over sizes up to a million: tiles that hold the group, within what a thread can hold."""
    from normnorm.triton_kernels import plan as planning

    def holds(plan: Any, held: int, itemsize: int) -> bool:
        each = plan.K * plan.R * plan.L / (32 * plan.warps)
        return plan.K <= planning.LARGEST_K and each <= max(1, planning._held(held, itemsize))

    sizes = [*range(1, 130), 196, 768, 1000, 1024, 3136, 5120, 8192, 12544, 16384, 50000, 10**6]
    for itemsize in (2, 4, 8):
        for held in (planning.FORWARD_HELD, planning.BACKWARD_HELD):
            for length in sizes:
                plan = planning.row_tiles(length, 1000, itemsize, held)
                if plan is None:
                    assert length > 32 * planning.LARGEST_WARPS * planning._held(held, itemsize) / 2
                else:
                    assert length <= plan.K * plan.L
                    assert holds(plan, held, itemsize)
                for runs in (2, 7, 256):
                    plan = planning.group_tiles(runs, length, True, itemsize, held)
                    if plan is not None:
                        chunks = runs * planning.ceil_div(length + 3, plan.L)
                        assert chunks <= plan.K * plan.R
                        assert holds(plan, held, itemsize)
                plan = planning.column_tiles(length, 100, itemsize, held)
                if plan is not None:
                    assert length <= plan.K * plan.R
                    assert holds(plan, held, itemsize)
                for columns in (False, True):
                    plan = planning.stream_tiles(columns, 64, 64, 256, length, True, itemsize)
                    assert 32 * plan.warps * 8 >= plan.R * plan.L
                    assert 1 <= plan.splits <= planning.LARGEST_COLUMN_SPLITS


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
def test_bad_arguments_are_refused_with_the_sentences_of_the_checks():
    ops = backends.get("triton")
    case = Case("batch", (4, 3))
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.forward(x, *NONE, torch.ones(4), None, None, None, None, *case.config("triton"))
    with pytest.raises(ValueError, match="needs a seed"):
        ops.forward(x, *NONE, None, None, None, None, None, *case.config("triton", noise_train=1.0))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        ops.forward(x[:1], *NONE, None, None, None, None, None, *case.config("triton"))
    with pytest.raises(ValueError, match="order must be 1 or 2"):
        ops.forward(x, *NONE, None, None, None, None, None, *case.config("triton", order=3))


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


@pytest.mark.slow
@pytest.mark.parametrize("number", range(16))
@interpreted
def test_selfcheck_passes(number):
    """What ``normnorm doctor`` measures of each layer."""
    from normnorm import selfcheck

    case = selfcheck.CASES[number]
    for dtype in selfcheck.DTYPES:
        errors = selfcheck.worst_errors(case, "triton", dtype, "cpu")
        assert max(errors.values()) <= selfcheck.bound(dtype), (case, dtype, errors)


def test_the_spec_of_a_kernel_is_hashable_and_prints_all_it_holds():
    """Triton keeps compiled kernels by it."""
    if missing():
        pytest.skip(str(missing()))
    from normnorm.triton_kernels.params import Spec

    spec = Spec(LAYOUT=1, R=2, L=64)
    assert hash(spec) == hash(replace(spec))
    assert repr(replace(spec, ALIGN=4)) != repr(spec)
