"""The raw ops by keyword, both passes of a case by any backend, and their comparison with
the reference in float64.

A bound is the rounding to storage, 64 rounding units relative to the largest value, and on a GPU
the error of the normals. A unit is 2^-22 on a GPU, the error of its special-function instructions,
and 2^-24 on a CPU.
"""

from collections.abc import Sequence
from typing import Any

import torch
from oracle import Case, compute_dtype, draw, draw_parameters
from torch import Tensor

from normnorm import backends
from normnorm.noise import standard_normals
from normnorm.statistics import Row

CPU_UNIT, GPU_UNIT = 2.0**-24, 2.0**-22
_ROUNDING = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
NONE = (None, None, None)
RESULTS = ("y", "stats", "du", "dw", "db")


def forward(
    config: Sequence[Any], input: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    *, running: Sequence[Tensor | None] = NONE, residual: Tensor | None = None,
    seed: Tensor | None = None, noise_scale: Tensor | None = None, prenorm: bool = False,
    keep_stats: bool = True,
) -> tuple[Any, ...]:  # fmt: skip
    """Of ``normal_norm_forward``."""
    return (
        input, *running, weight, bias, residual, seed, noise_scale, prenorm, keep_stats, *config
    )  # fmt: skip


def backward(
    config: Sequence[Any], grad_output: Tensor, input: Tensor, stats: Tensor,
    weight: Tensor | None = None, bias: Tensor | None = None, *, output: Tensor | None = None,
    seed: Tensor | None = None, grad_sum: Tensor | None = None,
    needs: Sequence[bool] = (True, True, True), frozen: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Of ``normal_norm_backward``."""
    return (
        grad_output, input, stats, weight, bias, output, seed, grad_sum, *needs, frozen, *config
    )  # fmt: skip


# --- both passes of a case -----------------------------------------------------------------------


def operands(
    case: Case, dtype: torch.dtype = torch.float32, last: bool = False, law: str = "normal",
    parameter_dtype: torch.dtype | None = None, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Tensors for both passes, channels_last where ``last``; x follows ``law``."""
    kept = parameter_dtype or compute_dtype(dtype)
    found = dict(zip(("weight", "bias"), draw_parameters(case, 2, kept, device), strict=True))
    laws = {"x": law, "residual": "normal", "g": "normal", "grad_sum": "normal"}
    for seed, (name, each) in enumerate(laws.items()):
        found[name] = draw(case, each, 40 + seed, dtype, device)
        if last:
            found[name] = channels_last(found[name])
    return found


def running_statistics(t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, variance, lambda) for a batch layer's evaluation, another for every channel."""
    ramp = torch.linspace(0.5, 1.4, len(t["weight"])).to(t["weight"])
    return ramp - 0.8, ramp, 2.0 - ramp


def channels_last(t: Tensor) -> Tensor:
    return t.movedim(1, -1).contiguous().movedim(-1, 1)


def forward_pass(
    backend: str, case: Case, t: dict[str, Tensor], fused: Sequence[str] = (), last: bool = False,
    *, running: Sequence[Any] = NONE, noise_scale: Tensor | None = None, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, stats, normalized tensor), with what is ``fused`` of residual, sum and relu."""
    prenorm = "sum" in fused
    y, stats, total = backends.get(backend).forward(
        *forward(
            _config(case, fused, last, options), t["x"], t.get("weight"), t.get("bias"),
            running=running, residual=t["residual"] if prenorm or "residual" in fused else None,
            seed=_seed(t, options), noise_scale=noise_scale, prenorm=prenorm,
        )
    )  # fmt: skip
    return y, stats, total if prenorm else t["x"]


def backward_pass(
    backend: str, case: Case, t: dict[str, Tensor], saved: tuple[Tensor, Tensor, Tensor],
    fused: Sequence[str] = (), last: bool = False, *, needs: Sequence[bool] | None = None,
    frozen: bool = False, **options: Any,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(du, dw, db) after forward_pass(); of the parameters that there are unless ``needs`` says
    otherwise."""
    y, stats, x = saved
    return backends.get(backend).backward(
        *backward(
            _config(case, fused, last, options), t["g"], x, stats, t.get("weight"), t.get("bias"),
            output=y if "relu" in fused else None, seed=_seed(t, options),
            grad_sum=t["grad_sum"] if "sum" in fused else None,
            needs=needs or (True, "weight" in t, "bias" in t), frozen=frozen,
        )
    )  # fmt: skip


def both_passes(
    backend: str, case: Case, t: dict[str, Tensor], fused: Sequence[str] = (), last: bool = False,
    *, mask: Tensor | None = None, backward: str = "", running: Sequence[Any] = NONE,
    noise_scale: Tensor | None = None, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """(y, stats, du, dw, db); relu's gradient is masked by ``mask`` in place of y where given, and
    the backward pass is the backend ``backward``'s."""
    y, stats, x = forward_pass(
        backend, case, t, fused, last, running=running, noise_scale=noise_scale, **options
    )
    saved = (y if mask is None else mask, stats, x)
    frozen = running[0] is not None
    gradients = backward_pass(
        backward or backend, case, t, saved, fused, last, frozen=frozen, **options
    )
    return y, stats, *gradients


def _config(
    case: Case, fused: Sequence[str], last: bool, options: dict[str, Any]
) -> tuple[Any, ...]:
    """The configuration without the backend's name."""
    activation = "relu" if "relu" in fused else ""
    return case.config("", channels_last=last, activation=activation, **options)[:-1]


def _seed(t: dict[str, Tensor], options: dict[str, Any]) -> Tensor | None:
    """That of a pass with noise: the operands' own, or 77."""
    if not options.get("noise_train"):
        return None
    return t["seed"] if "seed" in t else torch.tensor([77], device=t["x"].device)


# --- comparisons ---------------------------------------------------------------------------------


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
    """Requires results within their bounds of the reference's. With relu the gradient passes where
    the output found here, or ``mask``, is positive, as a rounding may change a sign."""
    options = {"mask": got[0], **options}
    options.pop("backward", None)
    for name, given in options.items():
        if isinstance(given, Tensor):
            options[name] = given.double()
    if "running" in options:
        options["running"] = [r.double() for r in options["running"]]
    exact = {n: tensor if n == "seed" else tensor.double() for n, tensor in t.items()}
    if "sum" in fused:  # it is normalized as it is stored
        exact["x"] = (t["x"] + t["residual"]).double()
        exact["residual"] = torch.zeros_like(exact["x"])
    y, stats, du, dw, db = both_passes("reference", case, exact, fused, last, **options)
    on_gpu = unit == GPU_UNIT
    unit = 2.0**-49 if t["x"].dtype == torch.float64 else unit
    noise: Tensor | float = 0.0
    noise_in_weight: Tensor | float = 0.0
    if options.get("noise_train") and on_gpu:
        z = standard_normals(case.shape, _seed(t, options), 0, last)
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


def assert_fused_equals_steps(
    backend: str, case: Case, t: dict[str, Tensor], last: bool = False, **options: Any
) -> None:
    """Bit for bit, in a dtype that storage does not round."""
    last = last and len(case.shape) > 2
    for fused in (("residual", "relu"), ("sum", "relu")):
        got = both_passes(backend, case, t, fused, last, **options)
        steps = {**t, "g": torch.where(got[0] <= 0, 0.0, t["g"])}
        if "sum" in fused:
            steps["x"] = t["x"] + t["residual"]
        y, stats, du, dw, db = both_passes(backend, case, steps, (), last, **options)
        y = y if "sum" in fused else y + t["residual"]
        du = du + t["grad_sum"] if "sum" in fused else du
        for name, a, b in zip(RESULTS, got, (y.relu(), stats, du, dw, db), strict=True):
            assert torch.equal(a, b), f"{fused}: {name}"
        assert got[0].stride() == got[2].stride() == t["x"].stride()
