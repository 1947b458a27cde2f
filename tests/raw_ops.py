"""The raw ops by keyword, and the passes of a case by any backend."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from oracle import Case, compute_dtype, draw, draw_parameters
from torch import Tensor

from normnorm import backends

NONE = (None, None, None)
ALL = (True, True, True)
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
            seed=seed_of(t, options), noise_scale=noise_scale, prenorm=prenorm,
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
            output=y if "relu" in fused else None, seed=seed_of(t, options),
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


def exactly(t: dict[str, Tensor], fused: Sequence[str] = ()) -> dict[str, Tensor]:
    """The operands in float64; a pass normalizes the sum as it is stored."""
    exact = {name: tensor.double() for name, tensor in t.items() if name != "seed"}
    if "sum" in fused:
        exact["x"] = (t["x"] + t["residual"]).double()
        exact["residual"] = torch.zeros_like(exact["x"])
    return exact


def _config(
    case: Case, fused: Sequence[str], last: bool, options: dict[str, Any]
) -> tuple[Any, ...]:
    """The configuration without the backend's name."""
    activation = "relu" if "relu" in fused else ""
    return case.config("", channels_last=last, activation=activation, **options)[:-1]


def seed_of(t: dict[str, Tensor], options: dict[str, Any]) -> Tensor | None:
    """That of a pass with noise: the operands' own, or 77."""
    if not options.get("noise_train"):
        return None
    return t["seed"] if "seed" in t else torch.tensor([77], device=t["x"].device)


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
