"""Tiers, shapes, tolerances and the comparison for the tests of the CUDA kernels."""

from __future__ import annotations

from dataclasses import replace

import torch
from host_cuda.harness import Call, Launchers
from torch import Tensor

from normnorm.statistics import Row

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ORDERS = (0, 1, 2, 3)

# Relative to the element (one rounding to storage) and to the largest element of the tensor.
ROUNDING = {
    torch.float32: 0.0,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
    torch.float64: 0.0,
}
ABSOLUTE = {torch.float32: 4e-6, torch.bfloat16: 4e-6, torch.float16: 4e-6, torch.float64: 1e-13}

ROW_TIERS = {
    "block": {"tier": "block", "thread_groups": 2},
    "shared": {"tier": "block", "threads": 32, "thread_groups": 2},
    "cluster": {"tier": "cluster", "threads": 32, "blocks": 2, "thread_groups": 2},
    "grid": {"tier": "grid", "threads": 64, "blocks": 3, "thread_groups": 2},
    "streaming": {"tier": "streaming", "blocks": 2, "thread_groups": 3},
}
COLUMN_TIERS = {
    "one block": {"tier": "grid", "blocks": 1, "thread_groups": 2},
    "grid": {"tier": "grid", "blocks": 2, "thread_groups": 2},
    "streaming": {"tier": "streaming", "blocks": 2},
}
# kind, shape, options; no number of thread groups divides the number of groups
ROWS = {
    "layer": ("layer", (5, 2400), {"normalized_ndim": 1}),
    "layer-ragged": ("layer", (5, 37), {"normalized_ndim": 1}),
    "batch": ("batch", (5, 5, 16, 16), {}),
    "batch-ragged": ("batch", (7, 3, 7, 7), {}),
    "group": ("group", (3, 6, 8, 8), {"num_groups": 2}),
    "group-ragged": ("group", (3, 6, 5, 5), {"num_groups": 2}),
    "instance": ("instance", (2, 3, 24, 24), {}),
    "instance-1d": ("instance", (2, 3, 1001), {}),
}
COLUMNS = {
    "batch": ("batch", (6, 16, 5, 5), {}),
    "batch-ragged": ("batch", (6, 5, 5, 5), {}),
    "batch-2d": ("batch", (150, 200), {}),
    "batch-tall": ("batch", (5, 8, 5, 10), {}),
    "group": ("group", (3, 12, 5, 5), {"num_groups": 4}),
    "group-wide": ("group", (2, 128, 3, 3), {"num_groups": 1}),
    "instance": ("instance", (3, 8, 6, 6), {}),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def make(case: tuple, dtype: torch.dtype, columns: bool = False, **options) -> tuple[Call, Tensor]:
    """A call with weight and bias, and an upstream gradient."""
    kind, shape, extra = case
    x, g = torch.randn(shape), torch.randn(shape)
    x = torch.where(torch.rand(shape) < 0.3, x.exp(), x).to(dtype)  # skewed: lambda away from 1
    g = g.to(dtype)
    if columns and len(shape) > 2:
        x, g = (t.to(memory_format=torch.channels_last) for t in (x, g))
    parameters = shape[-extra["normalized_ndim"] :] if kind == "layer" else (shape[1],)
    wanted = options.pop("parameter_dtype", compute_dtype(dtype))
    weight = (torch.rand(parameters) + 0.5).to(wanted)
    bias = torch.randn(parameters).to(wanted)
    return Call(kind, x, weight, bias, columns=columns, **extra, **options), g


def assert_close(
    got: Tensor, want: Tensor, dtype: torch.dtype, what: str, times: float = 1, least: float = 0
) -> None:
    """``least``: the size of the terms, where the result is a difference that may cancel."""
    got, want = got.double(), want.double()
    scale = want.abs().max().clamp_min(least)
    allowed = ROUNDING[dtype] * want.abs() + times * ABSOLUTE[dtype] * scale + 1e-30
    worst = ((got - want).abs() / allowed).max().item()
    assert worst <= 1, f"{what}: {worst:.2f} times the allowed error"  # NaN fails too


def assert_statistics(got: Tensor, want: Tensor, x: Tensor) -> None:
    """Row by row; the mean is the sum of its two rows."""
    tolerance = ABSOLUTE[got.dtype]
    mean, expected = (s.double()[Row.MEAN] + s.double()[Row.MEAN_LOW] for s in (got, want))
    assert (mean - expected).abs().max() <= tolerance * x.double().abs().max(), "mean"
    for row in (Row.RSTD, Row.LMBDA, Row.NOISE_SCALE, Row.MEAN_HD, Row.MEAN_D, Row.CURVATURE):
        scale = want[row].abs().max().clamp_min(0.1)
        assert (got[row].double() - want[row]).abs().max() <= 4 * tolerance * scale, row.name


FUSIONS = {  # fused with the norm: after it, before it, both
    "epilogue": ("residual", "relu"),
    "prologue": ("addend", "grad_sum"),
    "both": ("residual", "relu", "addend", "grad_sum"),
}


def fuse(call: Call, names: tuple[str, ...]) -> Call:
    """The same with the named operations fused."""
    tensors = {
        n: torch.empty_like(call.input).copy_(torch.randn(call.input.shape))
        for n in names
        if n != "relu"
    }
    return replace(call, relu="relu" in names, **tensors)


def check(kernels: Launchers, call: Call, g: Tensor) -> tuple[Tensor, ...]:
    """Compares forward and backward with the reference in float64; returns the results."""
    output, stats = call.forward(kernels)
    du, dw, db = call.backward(kernels, g, stats)
    want = call.expected(g)
    dtype = call.input.dtype
    if call.addend is not None:
        assert torch.equal(call.sum, call.input + call.addend)
    parameter = call.weight.dtype if call.weight is not None else dtype
    assert_close(output, want[0], dtype, "output")
    assert_statistics(stats, want[1], call.input)
    size = (want[1][Row.RSTD].max() * g.double().abs().max()).item()
    assert_close(du, want[2], dtype, "gradient of the input", 4, size)
    for got, expected, name in ((dw, want[3], "weight"), (db, want[4], "bias")):
        if expected is not None:
            assert_close(got, expected, parameter, f"gradient of the {name}", 4)
    return output, stats, du, dw, db


def same(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> bool:
    """Bitwise, NaN included."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in pairs)
