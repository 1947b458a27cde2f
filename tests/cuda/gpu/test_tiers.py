"""Every tier: forced on each kind of layer, and planned automatically.

Forced plans call the launchers directly (``forced.py``); automatic ones are those of
``normnorm doctor --plan``.
"""

from __future__ import annotations

import pytest
import torch
from host_cuda.cases import COLUMN_TIERS, COLUMNS, ROW_TIERS, ROWS

from normnorm.backends import cuda

from . import forced
from .cases import DTYPES, Case, assert_same, check, compare, make
from .conftest import DRY

# A dry run has a few; tests/cuda/test_cuda_host.py has them all on the CPU.
FORCED_DTYPES = DTYPES[:1] if DRY else DTYPES
FORCED_ROWS = ("layer", "batch-ragged", "group") if DRY else tuple(ROWS)
FORCED_COLUMNS = ("batch-ragged", "group") if DRY else tuple(COLUMNS)
# With as many threads and blocks as a device takes; those above are small for the run on the CPU.
LARGE = {
    name: dict(zip(("tier", "threads", "blocks", "thread_groups"), plan, strict=True))
    for name, plan in {
        "cluster of 8": ("cluster", 64 if DRY else 192, 8, 2),
        "grid of many": ("grid", 192, 4 if DRY else 32, 2),
        "one grid": ("grid", 192, 8 if DRY else 64, 1),
        "streaming": ("streaming", 0, 4 if DRY else 64, 4 if DRY else 16),
    }.items()
}


@pytest.fixture(scope="module")
def kernels(rig):
    return forced.kernels(rig)


def _check(rig, kernels, *given, **options) -> None:
    """A forced plan gives the right results, and the same bits again."""
    call, results = forced.run(rig, kernels, *given, **options, times=2)
    compare(call, results[0])
    assert_same(*results, "the same again")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tier", ROW_TIERS)
@pytest.mark.parametrize("case", FORCED_ROWS)
def test_forced_tiers_in_the_rows_layout(rig, kernels, case, tier, dtype, fused):
    _check(rig, kernels, ROWS[case], False, ROW_TIERS[tier], dtype, fused=fused)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("case", "tier"),
    # groups of several columns are always streamed
    [(c, t) for c in FORCED_COLUMNS for t in COLUMN_TIERS if "group" not in c or t == "streaming"],
)
def test_forced_tiers_in_the_columns_layout(rig, kernels, case, tier, dtype, fused):
    _check(rig, kernels, COLUMNS[case], True, COLUMN_TIERS[tier], dtype, fused=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tier", LARGE)
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_forced_tiers_at_size(rig, kernels, kind, tier, dtype):
    row = {
        "layer": ("layer", rig.pick((13, 150_001), (3, 2500)), {"normalized_ndim": 1}),
        "batch": ("batch", rig.pick((37, 11, 64, 65), (5, 3, 9, 9)), {}),
    }[kind]
    _check(rig, kernels, row, False, LARGE[tier], dtype, noise=1.0)


# Shapes whose plans are of all tiers on a GPU with clusters.
AUTOMATIC = (
    Case("row-warp", "layer", (1000, 96), (3, 96), trailing=1),
    Case("row-block", "layer", (500, 4096), (3, 512), trailing=1),
    Case("row-shared", "layer", (300, 40_000), (2, 700), trailing=1),
    Case("row-cluster", "layer", (20, 300_000), (1, 900), trailing=1),
    Case("row-grid", "layer", (2, 6_000_000), (1, 1100), trailing=1),
    Case("row-streaming", "layer", (1, 16_000_000), (1, 1300), trailing=1),
    Case("channel-tile", "batch", (64, 64, 14, 14), (3, 4, 4, 4)),
    Case("channel-grid", "batch", (256, 8, 56, 56), (3, 2, 5, 5)),
    Case("channel-streaming", "batch", (256, 1, 224, 224), (3, 2, 6, 6)),
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("case", "last"),
    [
        pytest.param(case, last, id=f"{case.name}{'-last' if last else ''}")
        for case in AUTOMATIC
        for last in ((False,) if case.kind == "layer" else (False, True))
    ],
)
def test_automatic_tiers(rig, backend, case, last, dtype):
    check(make(rig, case, dtype, channels_last=last, noise_train=0.7))


def test_the_shapes_above_take_every_tier(rig):
    """So that no tier of this device goes untested."""
    device = cuda.current_device()
    if device is None and cuda.missing() is None:
        device = cuda.DEVICE_MODELS["H200"]
    if device is None:
        pytest.skip("no GPU, and no compiled CUDA kernels to plan with")
    tiers = set()
    for case in AUTOMATIC:
        for backward in (False, True):
            x = torch.empty(case.gpu, device="meta", dtype=torch.bfloat16)
            found = cuda.plan(
                x, case.kind, device, normalized_ndim=case.trailing, backward=backward
            )
            tiers.add(found.tier.split(",")[0])
    wanted = {"warp", "block", "co-operating blocks", "streaming"}
    wanted |= {"cluster"} if device.clusters else set()
    assert wanted <= tiers, f"no shape takes {', '.join(wanted - tiers)}"
