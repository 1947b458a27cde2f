"""Targets of the kernels, and whether the rows of a run meet them.

A target without rows is neither met nor missed; one with fewer rows than it wants says so. Rows are
those of the benchmark's files, as plain data.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
_WORK = ("suite", "layer", "shape", "dtype", "memory_format", "mode", "operation", "method")


def _beside(row: Row, rows: Sequence[Row], field: str, *providers: str) -> float | None:
    """A number of the row over that of a provider in the same work."""
    for other in rows:
        same = other["provider"] in providers and all(other[k] == row[k] for k in _WORK)
        if same and other[field] and row[field]:
            return row[field] / other[field]
    return None


def share_of_copy(row: Row, rows: Sequence[Row]) -> float | None:
    """Its bytes a second over those of a copy of the same input."""
    for copy in rows:
        same = all(copy[k] == row[k] for k in ("shape", "dtype", "memory_format", "method"))
        if same and copy["provider"] == "copy" and copy["median_ms"] and row["median_ms"]:
            speed = copy["model_bytes"] / copy["median_ms"]
            return row["model_bytes"] / row["median_ms"] / speed
    return None


@dataclass(frozen=True)
class Target:
    """A number to reach."""

    text: str  # what it is about
    goal: float
    where: dict[str, Any]  # fields that a row has to have to count, each with its value or values
    of: int = 1  # how many rows it wants
    # The number of a row: its time over that of torch's layer, the faster one where there are two.
    value: Callable[[Row, Sequence[Row]], float | None] = lambda row, rows: row["ratio"]
    worst: bool = True  # the worst row decides, not the geometric mean of all
    at_most: bool = True  # less is better


_RESNET = {"suite": "resnet", "mode": "noise", "operation": "full"}
_ROWS = {"suite": "tokens", "mode": "noise", "operation": "full", "dtype": "bfloat16"}
_DEFINITION = {"suite": "definition", "operation": "full"}
_SHARE = {"mode": "noise", "suite": ("resnet", "tokens"), "memory_format": "contiguous"}
_FORWARD = {**_SHARE, "operation": "forward"}

TARGETS = (
    Target("BatchNormalNorm2d training, ResNet-50 shapes at batch 256 / faster of torch and cuDNN "
           "(geometric mean)", 1.0, _RESNET, 48, worst=False),
    Target("LayerNormalNorm training, bf16 rows of 768 to 8192 / torch", 1.0, _ROWS, 5),
    Target("both in training / torch.compile of the definition", 1 / 3, _DEFINITION, 2,
           lambda row, rows: _beside(row, rows, "median_ms", "compiled-reference")),
    Target("both in training / the definition in eager mode", 1 / 15, _DEFINITION, 2,
           lambda row, rows: _beside(row, rows, "median_ms", "reference")),
    Target("BatchNormalNorm2d evaluation / torch", 1.0, {"suite": "resnet", "mode": "eval"}),
    Target("LayerNormalNorm evaluation / torch", 1.1, {"suite": "tokens", "mode": "eval"}),
    Target("128 channels x 4.19 M fp16, training forward, ms (the best public plain BatchNorm on "
           "an H200: 0.912)", 0.912, {"suite": "largest"}, 1, lambda row, rows: row["median_ms"]),
    Target("share of the copy roof, forward, fp32", 0.80, {**_FORWARD, "dtype": "float32"}, 2,
           share_of_copy, at_most=False),
    Target("share of the copy roof, forward, bf16", 0.65, {**_FORWARD, "dtype": "bfloat16"}, 2,
           share_of_copy, at_most=False),
    Target("share of the copy roof, backward", 0.60, {**_SHARE, "operation": "backward"}, 4,
           share_of_copy, at_most=False),
    Target("memory kept for the backward pass / BatchNorm's", 1.01, _RESNET, 48,
           lambda row, rows: _beside(row, rows, "kept_bytes", "torch", "cudnn")),
    Target("BatchNormalNorm1d training, (N, C) fp32 / torch", 0.5, {"suite": "features"}, 3),
    Target("small tensors, launches included / torch", 1.5, {"suite": "small"}, 8),
)  # fmt: skip
NETWORK = Target("ResNet-50 training step, bf16 autocast, channels_last / BatchNorm2d", 1.03,
                 {"network": "resnet50"})  # fmt: skip


def _counts(row: Row, where: dict[str, Any]) -> bool:
    return all(
        row[name] in value if isinstance(value, tuple) else row[name] == value
        for name, value in where.items()
    )


def _judged(target: Target, provider: str, rows: Sequence[Row]) -> dict[str, Any]:
    mine = [r for r in rows if r["provider"] == provider and _counts(r, target.where)]
    bad = sum(r["status"] in ("wrong", "failed") for r in mine)
    values = [v for r in mine if r["status"] == "ok" and (v := target.value(r, rows)) is not None]
    value, met, remark = None, None, "not measured"
    if values:
        value = math.exp(sum(map(math.log, values)) / len(values))
        if target.worst:
            value = max(values) if target.at_most else min(values)
        met = value <= target.goal if target.at_most else value >= target.goal
        remark = "" if len(values) >= target.of else f"from {len(values)} of {target.of} rows"
    if bad:
        met, remark = False, f"{bad} rows failed or were wrong"
    return {
        "target": f"{provider.removeprefix('normnorm-')}: {target.text}", "goal": target.goal,
        "at_most": target.at_most, "value": value, "met": met, "rows": len(values),
        "of": target.of, "remark": remark,
    }  # fmt: skip


def judge(
    rows: Sequence[Row], networks: Sequence[Row], providers: Sequence[str]
) -> list[dict[str, Any]]:
    """Every target for every provider of ours, by the engine's names; ``rows`` and ``networks``
    are the "measurements" and "networks" of the benchmark's files."""
    found = [_judged(target, provider, rows) for provider in providers for target in TARGETS]
    return found + [_judged(NETWORK, provider, networks) for provider in providers]
