"""Shapes for the GPU tests, each with a small one for the dry run, and both passes over them,
compared with the reference in float64 on the same device with the same noise (``raw_ops.py``)."""

from typing import Any

import raw_ops
import torch
from oracle import Case, compute_dtype
from torch import Tensor

from .rig import Rig, mode

SEED = 20260105
# On a GPU, and in a dry run.
CASES = {
    "batch-2d": (Case("batch", (32, 64, 28, 28)), Case("batch", (3, 4, 6, 6))),
    "batch-2d-odd": (Case("batch", (13, 37, 7, 7)), Case("batch", (3, 5, 3, 3))),
    "batch-nc": (Case("batch", (4096, 96)), Case("batch", (40, 6))),
    "batch-nc-odd": (Case("batch", (1003, 129)), Case("batch", (21, 5))),
    "batch-1d": (Case("batch", (16, 33, 257)), Case("batch", (3, 4, 9))),
    "batch-3d": (Case("batch", (4, 6, 9, 10, 11)), Case("batch", (2, 3, 2, 3, 4))),
    "layer": (Case("layer", (512, 1024), 0, 1), Case("layer", (5, 64), 0, 1)),
    "layer-odd": (Case("layer", (300, 1128), 0, 1), Case("layer", (7, 37), 0, 1)),
    "layer-long": (Case("layer", (6, 65536), 0, 1), Case("layer", (2, 3000), 0, 1)),
    "layer-2d": (Case("layer", (9, 5, 48, 50), 0, 2), Case("layer", (2, 3, 4, 5), 0, 2)),
    "group": (Case("group", (8, 32, 20, 20), 2), Case("group", (2, 6, 4, 4), 2)),
    "group-odd": (Case("group", (5, 30, 7, 9), 6), Case("group", (2, 6, 3, 5), 6)),
    "instance": (Case("instance", (6, 16, 40, 40)), Case("instance", (2, 3, 6, 6))),
    "instance-1d": (Case("instance", (5, 8, 1001)), Case("instance", (2, 3, 37))),
    "instance-3d": (Case("instance", (3, 4, 8, 9, 10)), Case("instance", (2, 2, 2, 3, 4))),
}


def make(
    rig: Rig, case: Case, dtype: torch.dtype = torch.float32, last: bool = False,
    parameter_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """Operands of both passes, as raw_ops.operands() but drawn on the device: a skewed input, so
    that no lambda is 1, and a weight of both signs."""

    def normal(shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, device=rig.device)

    t = {name: normal(case.shape) for name in ("x", "residual", "g", "grad_sum")}
    t["x"] = torch.where(torch.rand_like(t["x"]) < 0.3, (0.7 * t["x"]).exp(), t["x"])
    t = {name: raw_ops.channels_last(each) if last else each for name, each in t.items()}
    t = {name: each.to(dtype) for name, each in t.items()}
    weight, bias = (normal(case.parameter_shape) for _ in range(2))
    kept = parameter_dtype or compute_dtype(dtype)
    t["weight"] = (torch.rand_like(weight) + 0.5).copysign(weight).to(kept)
    t["bias"] = bias.to(kept)
    t["seed"] = torch.tensor([SEED], device=rig.device)  # before the passes, which do not wait
    return t


def check(
    rig: Rig, backend: str, case: Case, t: dict[str, Tensor], fused: tuple[str, ...] = (),
    last: bool = False, **options: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Compares both passes with the reference; returns their results."""
    got = raw_ops.both_passes(backend, case, t, fused, last, **options)
    compare(rig, case, t, fused, last, got, **options)
    return got


def compare(
    rig: Rig, case: Case, t: dict[str, Tensor], fused: tuple[str, ...], last: bool,
    got: tuple[Tensor, ...], **options: Any,
) -> None:  # fmt: skip
    """raw_ops.compare(), where the kernels ran."""
    if mode() != "compile":
        raw_ops.compare(case, t, fused, last, got, unit=rig.unit, **options)


def assert_same(first: tuple[Tensor, ...], second: tuple[Tensor, ...], what: str) -> None:
    """Bit for bit."""
    assert mode() == "compile" or raw_ops.same(first, second), f"{what}: the results differ"
