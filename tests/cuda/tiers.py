"""Every tier of the CUDA kernels as a forced plan, cases for each, and the comparison of both
passes with the reference in float64, for the kernels on the CPU and on a GPU.

A bound is the rounding to storage, 64 rounding units relative to the largest value, and on a GPU
the error of the normals. A unit is 2^-22 on a GPU, the error of its special-function instructions,
and 2^-24 on a CPU.
"""

from __future__ import annotations

from typing import Any

import torch
from oracle import Case
from raw_ops import both_passes, exactly, seed_of
from torch import Tensor

from normnorm.noise import standard_normals
from normnorm.statistics import Row

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CPU_UNIT, GPU_UNIT = 2.0**-24, 2.0**-22
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

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
# No number of thread groups divides the number of groups.
ROWS = {
    "layer": Case("layer", (5, 2400), normalized_ndim=1),
    "layer-ragged": Case("layer", (5, 37), normalized_ndim=1),
    "batch": Case("batch", (5, 5, 16, 16)),
    "batch-ragged": Case("batch", (7, 3, 7, 7)),
    "group": Case("group", (3, 6, 8, 8), num_groups=2),
    "group-ragged": Case("group", (3, 6, 5, 5), num_groups=2),
    "instance": Case("instance", (2, 3, 24, 24)),
    "instance-1d": Case("instance", (2, 3, 1001)),
}
COLUMNS = {
    "batch": Case("batch", (6, 16, 5, 5)),
    "batch-ragged": Case("batch", (6, 5, 5, 5)),
    "batch-2d": Case("batch", (150, 200)),
    "batch-tall": Case("batch", (5, 8, 5, 10)),
    "group": Case("group", (3, 12, 5, 5), num_groups=4),
    "group-wide": Case("group", (2, 128, 3, 3), num_groups=1),
    "instance": Case("instance", (3, 8, 6, 6)),
}
# What may be fused with a norm: after it, before it, both.
FUSIONS = (("residual", "relu"), ("sum",), ("sum", "relu"))


def tiers_of(case: str, columns: bool) -> tuple[str, ...]:
    """The tiers that serve a case; groups of several columns are always streamed."""
    if not columns:
        return tuple(ROW_TIERS)
    return ("streaming",) if "group" in case else tuple(COLUMN_TIERS)


def layouts(rows: tuple[str, ...], columns: tuple[str, ...]) -> list[tuple[str, str, bool]]:
    """(case, tier, whether the layout is columns) for every tier of these cases."""
    given = [(c, False) for c in rows] + [(c, True) for c in columns]
    return [(case, tier, last) for case, last in given for tier in tiers_of(case, last)]


def case_and_plan(case: str, tier: str, columns: bool) -> tuple[Case, dict[str, Any]]:
    return (COLUMNS if columns else ROWS)[case], (COLUMN_TIERS if columns else ROW_TIERS)[tier]


def check(
    backend: str, case: Case, t: dict[str, Tensor], fused: tuple[str, ...] = (),
    last: bool = False, *, unit: float = CPU_UNIT, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compares both passes with the reference in float64; returns their results."""
    last = last and len(case.shape) > 2
    got = both_passes(backend, case, t, fused, last, **options)
    compare(case, t, fused, last, got, unit=unit, **options)
    return got


def compare(
    case: Case, t: dict[str, Tensor], fused: tuple[str, ...], last: bool, got: tuple[Tensor, ...],
    *, unit: float = CPU_UNIT, **options: Any,
) -> None:  # fmt: skip
    """Requires results within their bounds of the reference's."""
    for name in ("running", "noise_scale"):
        if options.get(name) is not None:
            given = options[name]
            double = tuple(r.double() for r in given) if name == "running" else given.double()
            options = {**options, name: double}
    exact = {**t, **exactly(t, fused)}
    y, stats, du, dw, db = both_passes(
        "reference", case, exact, fused, last, mask=got[0].double(), **options
    )
    unit = 2.0**-49 if t["x"].dtype == torch.float64 else unit
    noise: Tensor | float = 0.0
    noise_in_weight: Tensor | float = 0.0
    if options.get("noise_train") and unit == GPU_UNIT:
        z = standard_normals(case.shape, seed_of(t, options), 0, last)
        # |noise| error of an element before the affine map; s is at most its largest group's
        scale = float(stats[Row.NOISE_SCALE].max()) * options["noise_train"]
        error = scale * normal_error(z, unit, last)
        noise = error * (t["weight"].double().abs().max() if "weight" in t else 1.0)
        noise_in_weight = (t["g"].double().abs() * error).sum(_summed(case))
    assert_close(got[0], y, unit, "output", extra=noise)
    assert_statistics(got[1], stats, t["x"], unit)
    size = float(stats[Row.RSTD].max() * t["g"].double().abs().max())
    assert_close(got[2], du, unit, "gradient of the input", times=4, least=size)
    if "weight" in t:
        assert_close(got[3], dw, unit, "gradient of the weight", times=4, extra=noise_in_weight)
    if "bias" in t:
        assert_close(got[4], db, unit, "gradient of the bias", times=4)


def assert_close(
    got: Tensor, want: Tensor, unit: float, what: str, *, times: float = 1.0, least: float = 0.0,
    extra: Tensor | float = 0.0,
) -> None:  # fmt: skip
    """``least``: the size of the terms, where the result is a difference that may cancel;
    ``extra``: a further allowed error."""
    assert got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, not {tuple(want.shape)}"
    exact, value = want.double(), got.double()
    scale = exact.abs().max().clamp_min(least)
    allowed = times * 64 * unit * scale + 1.01 * _ROUNDING.get(got.dtype, 0.0) * exact.abs()
    if got.dtype == torch.float16:
        allowed = allowed + 2.0**-24  # its smallest step
    error = (value - exact).abs()
    good = error <= allowed + extra  # false for NaN
    if not bool(good.all()):
        worst = torch.where(good, 0.0, (error / (allowed + extra)).nan_to_num(torch.inf))
        at = int(worst.flatten().argmax())
        raise AssertionError(
            f"{what}: {int((~good).sum())} of {good.numel()} elements out of bounds; worst at flat "
            f"index {at}: got {value.flatten()[at].item():.9g}, wanted "
            f"{exact.flatten()[at].item():.9g}, {worst.max().item():.3g} times the allowed error"
        )


def assert_statistics(got: Tensor, want: Tensor, x: Tensor, unit: float) -> None:
    """Row by row; the mean is the sum of its two rows."""
    mean, expected = (s.double()[Row.MEAN] + s.double()[Row.MEAN_LOW] for s in (got, want))
    assert_close(mean, expected, unit, "mean", least=float(x.double().abs().max()))
    for row in (Row.RSTD, Row.LMBDA, Row.NOISE_SCALE, Row.MEAN_HD, Row.MEAN_D, Row.CURVATURE):
        assert_close(got[row], want[row], unit, row.name, times=4, least=0.1)


def normal_error(z: Tensor, unit: float, last: bool) -> Tensor:
    """The error bound of each normal.

    A pair is a radius r = sqrt(-2 log u) at an angle. The logarithm errs absolutely near u = 1, by
    two units in r^2, so that r is off by that over r, yet at most by its root; sine and cosine err
    absolutely too, and so does the angle, together by less than eight units.
    """
    flat = (z.movedim(1, -1) if last else z).reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, flat.numel() % 2)).reshape(-1, 2)
    radius = padded.norm(dim=1, keepdim=True).expand(-1, 2).reshape(-1)[: flat.numel()]
    most = torch.full_like(radius, (2 * unit) ** 0.5)
    error = torch.minimum(most, 2 * unit / radius.clamp_min(unit)) + 8 * unit * radius
    if last:
        return error.reshape(z.movedim(1, -1).shape).movedim(-1, 1)
    return error.reshape(z.shape)


def _summed(case: Case) -> tuple[int, ...]:
    """The dimensions over which elements share a weight."""
    dim = len(case.shape)
    return tuple(range(dim - case.normalized_ndim)) if case.kind == "layer" else (0, *range(2, dim))


def same(a: tuple[Tensor | None, ...], b: tuple[Tensor | None, ...]) -> bool:
    """Bitwise, NaN included."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if x is not None]
    return all(torch.equal(x.nan_to_num(7.0), y.nan_to_num(7.0)) for x, y in pairs)
