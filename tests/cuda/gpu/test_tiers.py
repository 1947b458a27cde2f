"""Every tier: forced on each kind of layer, and planned automatically."""

import pytest
import torch
from oracle import Case
from raw_ops import both_passes
from tiers import COLUMNS, DTYPES, FUSIONS, ROWS, case_and_plan, layouts

from normnorm.backends import cuda

from .cases import assert_same, check, make
from .conftest import DRY

# A dry run has a few; tests/cuda/test_cuda_host.py has them all on the CPU.
FORCED_DTYPES = DTYPES[:1] if DRY else DTYPES
FORCED = (
    layouts(("layer", "batch-ragged", "group"), ("batch-ragged", "group")) if DRY
    else layouts(tuple(ROWS), tuple(COLUMNS))
)  # fmt: skip
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
NOISE = {"noise_train": 0.7}


def _check(rig, case, plan, dtype, fused=(), last=False) -> None:
    """A forced plan gives the right results, and the same bits again."""
    last = last and len(case.shape) > 2
    t = make(rig, case, dtype, last)
    with rig.forced(**plan):
        first = check(rig, "cuda", case, t, fused, last, **NOISE)
        again = both_passes("cuda", case, t, fused, last, **NOISE)
    assert_same(first, again, "the same again")


@pytest.mark.parametrize("fused", [(), FUSIONS[2]], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(("case", "tier", "columns"), FORCED)
def test_forced_tiers(rig, case, tier, columns, dtype, fused):
    _check(rig, *case_and_plan(case, tier, columns), dtype, fused, columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tier", LARGE)
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_forced_tiers_at_size(rig, kind, tier, dtype):
    case = {
        "layer": Case("layer", rig.pick((13, 150_001), (3, 2500)), normalized_ndim=1),
        "batch": Case("batch", rig.pick((37, 11, 64, 65), (5, 3, 9, 9))),
    }[kind]
    _check(rig, case, LARGE[tier], dtype)


# Shapes whose plans are of all tiers on a GPU with clusters, each with a small one.
AUTOMATIC = {
    "row-warp": (Case("layer", (1000, 96), 0, 1), Case("layer", (3, 96), 0, 1)),
    "row-block": (Case("layer", (500, 4096), 0, 1), Case("layer", (3, 512), 0, 1)),
    "row-shared": (Case("layer", (300, 40_000), 0, 1), Case("layer", (2, 700), 0, 1)),
    "row-cluster": (Case("layer", (20, 300_000), 0, 1), Case("layer", (1, 900), 0, 1)),
    "row-grid": (Case("layer", (2, 6_000_000), 0, 1), Case("layer", (1, 1100), 0, 1)),
    "row-streaming": (Case("layer", (1, 16_000_000), 0, 1), Case("layer", (1, 1300), 0, 1)),
    "channel-tile": (Case("batch", (64, 64, 14, 14)), Case("batch", (3, 4, 4, 4))),
    "channel-grid": (Case("batch", (256, 8, 56, 56)), Case("batch", (3, 2, 5, 5))),
    "channel-streaming": (Case("batch", (256, 1, 224, 224)), Case("batch", (3, 2, 6, 6))),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "last"),
    [
        pytest.param(name, last, id=f"{name}{'-last' if last else ''}")
        for name in AUTOMATIC
        for last in ((False,) if name.startswith("row") else (False, True))
    ],
)
def test_automatic_tiers(rig, backend, name, last, dtype):
    case = rig.pick(*AUTOMATIC[name])
    check(rig, backend, case, make(rig, case, dtype, last), (), last, **NOISE)


def test_the_shapes_above_take_every_tier(rig):
    """So that no tier of this device goes untested."""
    device = cuda.current_device()
    if device is None and cuda.missing() is None:
        device = cuda.DEVICE_MODELS["H200"]
    if device is None:
        pytest.skip("no GPU, and no compiled CUDA kernels to plan with")
    tiers = set()
    for case, _ in AUTOMATIC.values():
        for backward in (False, True):
            x = torch.empty(case.shape, device="meta", dtype=torch.bfloat16)
            found = cuda.plan(
                x, case.kind, device, normalized_ndim=case.normalized_ndim, backward=backward
            )
            tiers.add(found.tier.split(",")[0])
    wanted = {"warp", "block", "co-operating blocks", "streaming"}
    wanted |= {"cluster"} if device.clusters else set()
    assert wanted <= tiers, f"no shape takes {', '.join(wanted - tiers)}"
