"""What the kernels are meant to reach, and whether the rows of a run say that they do.

A target that no row speaks for is neither met nor missed; one that only some rows speak for says
so.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["TARGETS", "Target", "judge"]

Row = dict[str, Any]
Value = Callable[[Row, Sequence[Row]], float | None]


def _ratio(row: Row, rows: Sequence[Row]) -> float | None:
    """To torch's layer, the faster one where there are two."""
    return row["ratio"]


def _milliseconds(row: Row, rows: Sequence[Row]) -> float | None:
    return row["median_ms"]


def _share(row: Row, rows: Sequence[Row]) -> float | None:
    """Of the bytes a second that a copy of the same input moves."""
    return row["share_of_copy"]


def _against(provider: str) -> Value:
    """The row's time over that of a provider in the same work."""

    def value(row: Row, rows: Sequence[Row]) -> float | None:
        for other in rows:
            same = all(other[k] == row[k] for k in _WORK)
            if same and other["provider"] == provider and other["median_ms"]:
                return row["median_ms"] / other["median_ms"]
        return None

    return value


def _kept(row: Row, rows: Sequence[Row]) -> float | None:
    """Kept bytes over those of torch's layer in the same work."""
    for other in rows:
        same = all(other[k] == row[k] for k in _WORK)
        if same and other["provider"] in ("torch", "cudnn") and other["kept_bytes"]:
            return row["kept_bytes"] / other["kept_bytes"] if row["kept_bytes"] else None
    return None


_WORK = ("suite", "layer", "shape", "dtype", "memory_format", "mode", "operation", "method")


@dataclass(frozen=True)
class Target:
    """A number to reach.

    Attributes:
        text: what it is about.
        goal: the number.
        where: fields that a row has to have to count, each with its value or values.
        value: the number of a row.
        of: how many rows it wants.
        worst: the worst row decides, not the geometric mean of all.
        at_most: whether less is better.
    """

    text: str
    goal: float
    where: dict[str, Any]
    value: Value = _ratio
    of: int = 1
    worst: bool = True
    at_most: bool = True


_RESNET = {"suite": "resnet", "mode": "noise", "operation": "full"}
_ROWS = {"suite": "tokens", "mode": "noise", "operation": "full", "dtype": "bfloat16"}
_DEFINITION = {"suite": "definition", "operation": "full"}
_SHARE = {"mode": "noise", "suite": ("resnet", "tokens"), "memory_format": "contiguous"}

TARGETS = (
    Target(
        "BatchNormalNorm2d training, ResNet-50 shapes at batch 256 / faster of torch and cuDNN "
        "(geometric mean)", 1.0, _RESNET, of=48, worst=False,
    ),
    Target("LayerNormalNorm training, bf16 rows of 768 to 8192 / torch", 1.0, _ROWS, of=5),
    Target(
        "both in training / torch.compile of the definition", 1 / 3, _DEFINITION,
        _against("compiled-reference"), of=2,
    ),
    Target(
        "both in training / the definition in eager mode", 1 / 15, _DEFINITION,
        _against("reference"), of=2,
    ),
    Target("BatchNormalNorm2d evaluation / torch", 1.0, {"suite": "resnet", "mode": "eval"}),
    Target("LayerNormalNorm evaluation / torch", 1.1, {"suite": "tokens", "mode": "eval"}),
    Target(
        "128 channels x 4.19 M fp16, training forward, ms (the best public plain BatchNorm: 0.912)",
        0.912, {"suite": "largest", "operation": "forward"}, _milliseconds,
    ),
    Target(
        "share of the copy roof, forward, fp32", 0.80,
        {**_SHARE, "dtype": "float32", "operation": "forward"}, _share, of=2,
        at_most=False,
    ),
    Target(
        "share of the copy roof, forward, bf16", 0.65,
        {**_SHARE, "dtype": "bfloat16", "operation": "forward"}, _share, of=2,
        at_most=False,
    ),
    Target(
        "share of the copy roof, backward", 0.60, {**_SHARE, "operation": "backward"},
        _share, of=4, at_most=False,
    ),
    Target("memory kept for the backward pass / BatchNorm's", 1.01, _RESNET, _kept, of=48),
    Target(
        "BatchNormalNorm1d training, (N, C) fp32 / torch", 0.5,
        {"suite": "features", "operation": "full"}, of=3,
    ),
    Target("small tensors, launches included / torch", 1.5, {"suite": "small"}, of=8),
)  # fmt: skip
NETWORK = "ResNet-50 training step, bf16 autocast, channels_last / BatchNorm2d"
NETWORK_GOAL = 1.03


def _counts(row: Row, where: dict[str, Any]) -> bool:
    return all(
        row[name] in value if isinstance(value, tuple) else row[name] == value
        for name, value in where.items()
    )


def _judged(target: Target, provider: str, rows: Sequence[Row], exact: bool) -> dict[str, Any]:
    mine = [r for r in rows if r["provider"] == provider and _counts(r, target.where)]
    bad = [r for r in mine if r["status"] != "ok"]
    values = [v for r in mine if r["status"] == "ok" and (v := target.value(r, rows)) is not None]
    value = None
    if values and target.worst:
        value = max(values) if target.at_most else min(values)
    elif values:
        value = math.exp(sum(map(math.log, values)) / len(values))
    met = None
    if value is not None:
        met = value <= target.goal if target.at_most else value >= target.goal
    remark = None
    if not exact:
        remark, met = "of tiny inputs: says nothing", None
    elif bad:
        remark, met = f"{len(bad)} rows failed or were wrong", False
    elif value is not None and len(values) < target.of:
        remark = f"from {len(values)} of {target.of} rows"
    elif value is None:
        remark = "not measured"
    return {
        "target": f"{provider.removeprefix('normnorm-')}: {target.text}", "goal": target.goal,
        "at_most": target.at_most, "value": value, "met": met, "rows": len(values),
        "of": target.of, "remark": remark,
    }  # fmt: skip


def judge(
    rows: Sequence[Row], networks: Sequence[Row], providers: Sequence[str], exact: bool
) -> list[dict[str, Any]]:
    """Every target for every provider of ours.

    Args:
        rows, networks: of the benchmark's section.
        providers: ours, by the engine's names.
        exact: whether the rows are those that the targets speak of; else, as in a dry run, no
            target is met or missed.
    """
    found = [_judged(t, provider, rows, exact) for provider in providers for t in TARGETS]
    for provider in providers:
        row = next(
            (r for r in networks if r["network"] == "resnet50" and r["provider"] == provider), None
        )
        ratio = row["ratio"] if row else None
        remark = None if ratio is not None else ((row or {}).get("message") or "not measured")
        found.append(
            {
                "target": f"{provider.removeprefix('normnorm-')}: {NETWORK}",
                "goal": NETWORK_GOAL, "at_most": True, "value": ratio,
                "met": None if ratio is None else ratio <= NETWORK_GOAL,
                "rows": int(ratio is not None), "of": 1, "remark": remark,
            }
        )  # fmt: skip
    return found
