"""Every tier: forced on each kind of layer, and planned automatically.

Forced plans call the launchers directly (``forced.py``); automatic ones are those of
``normnorm doctor --plan``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from host_cuda import harness
from host_cuda.cases import COLUMN_TIERS, COLUMNS, FUSIONS, ROW_TIERS, ROWS, fuse

from normnorm.backends import cuda

from . import forced
from .cases import DTYPES, SEED, Case, assert_same, check, compare, make
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


def _assert_served(
    rig, kernels, row: tuple, columns: bool, force: dict, dtype, noise=0.7, fused=False
) -> None:
    """Output and gradients of a forced plan are right, and the same again, bit for bit."""
    kind, shape, extra = row
    groups, trailing = extra.get("num_groups", 0), extra.get("normalized_ndim", 0)
    call = make(
        rig, Case(kind, kind, shape, shape, groups, trailing), dtype,
        channels_last=columns and len(shape) == 4, noise_train=noise,
    )  # fmt: skip
    served = harness.Call(
        kind, call.input, call.weight, call.bias, num_groups=groups, normalized_ndim=trailing,
        noise_train=noise, seed=SEED, columns=columns, force=force,
    )  # fmt: skip
    if fused:
        served = fuse(served, FUSIONS["both"])
    results = []
    for _ in range(2):
        with call.input.device:  # where the harness makes its tensors
            output, stats = served.forward(kernels)
            du, dw, db = served.backward(kernels, call.grad, stats)
        results.append({"output": output, "input": du, "weight": dw, "bias": db})
    if fused:
        assert torch.equal(served.sum, call.input + served.addend)
        call = replace(
            call, input=served.sum, residual=served.residual, relu=True, grad_sum=served.grad_sum,
            found=output,
        )  # fmt: skip
    compare(call, results[0])
    assert_same(*results, "the same again")


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("tier", ROW_TIERS)
@pytest.mark.parametrize("case", FORCED_ROWS)
def test_forced_tiers_in_the_rows_layout(rig, kernels, case, tier, dtype, fused):
    _assert_served(rig, kernels, ROWS[case], False, ROW_TIERS[tier], dtype, fused=fused)


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("case", "tier"),
    # groups of several columns are always streamed
    [(c, t) for c in FORCED_COLUMNS for t in COLUMN_TIERS if "group" not in c or t == "streaming"],
)
def test_forced_tiers_in_the_columns_layout(rig, kernels, case, tier, dtype, fused):
    _assert_served(rig, kernels, COLUMNS[case], True, COLUMN_TIERS[tier], dtype, fused=fused)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("tier", LARGE)
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_forced_tiers_at_size(rig, kernels, kind, tier, dtype):
    row = {
        "layer": ("layer", rig.pick((13, 150_001), (3, 2500)), {"normalized_ndim": 1}),
        "batch": ("batch", rig.pick((37, 11, 64, 65), (5, 3, 9, 9)), {}),
    }[kind]
    _assert_served(rig, kernels, row, False, LARGE[tier], dtype, noise=1.0)


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
