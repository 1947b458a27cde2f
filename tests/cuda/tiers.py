"""Every tier of the CUDA kernels as a forced plan, and cases for each, on the CPU and on a GPU. The
backward pass of rows streams where a forced plan has several blocks a group."""

from typing import Any

import torch
from oracle import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

ROW_TIERS = {
    "block": {"tier": "block", "thread_groups": 2},
    "shared": {"tier": "block", "threads": 32, "thread_groups": 2},
    "cluster": {"tier": "cluster", "threads": 32, "blocks": 2, "thread_groups": 2},
    "grid": {"tier": "grid", "threads": 64, "blocks": 3, "thread_groups": 2},
    "streaming": {"tier": "streaming", "blocks": 2},
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
