"""Every rung of the residency ladder: forced upon each kind of layer, and chosen by the ladder.

The launchers are called past the ops (``forced.py``); what the ladder chooses for real shapes is
read from the same table as ``normnorm doctor --plan``.
"""

from __future__ import annotations

import pytest
import torch
from host_cuda import harness
from host_cuda.cases import COLUMN_RUNGS, COLUMNS, ROW_RUNGS, ROWS

from normnorm.backends import cuda

from . import forced
from .cases import DTYPES, SEED, Call, Case, assert_same, check, compare, make
from .conftest import DRY

# On the CPU tests/cuda/test_cuda_host.py has them all; here a few go through what is new to them.
FORCED_DTYPES = DTYPES[:1] if DRY else DTYPES
FORCED_ROWS = ("layer", "batch-ragged", "group") if DRY else tuple(ROWS)
FORCED_COLUMNS = ("batch-ragged", "group") if DRY else tuple(COLUMNS)
# As large as a device takes them: the small ones above are those of the run on the CPU.
LARGE = {
    "cluster of 8": {"rung": "cluster", "threads": 64 if DRY else 192, "blocks": 8, "teams": 2},
    "grid of many": {"rung": "grid", "threads": 192, "blocks": 4 if DRY else 32, "teams": 2},
    "one grid": {"rung": "grid", "threads": 192, "blocks": 8 if DRY else 64, "teams": 1},
    "streaming": {"rung": "streaming", "blocks": 4 if DRY else 64, "teams": 4 if DRY else 16},
}


@pytest.fixture(scope="module")
def kernels(rig):
    return forced.kernels(rig)


def _case(row: tuple) -> Case:
    kind, shape, extra = row
    groups, trailing = extra.get("num_groups", 0), extra.get("normalized_ndim", 0)
    return Case(kind, kind, shape, shape, groups, trailing)


def _run(kernels, call: Call, columns: bool, force: dict) -> dict[str, torch.Tensor]:
    """Output and gradients by a forced rung, each element of which has to be written."""
    case = call.case
    served = harness.Call(
        case.kind, call.input, call.weight, call.bias, num_groups=case.groups,
        normalized_ndim=case.trailing, noise_train=call.options["noise_train"], seed=SEED,
        columns=columns, force=force,
    )  # fmt: skip
    with call.input.device:  # where the harness makes its tensors
        output, stats = served.forward(kernels)
        du, dw, db = served.backward(kernels, call.grad, stats)
    return {"output": output, "input": du, "weight": dw, "bias": db}


def _assert_served(rig, kernels, row: tuple, columns: bool, force: dict, dtype, noise=0.7) -> None:
    case = _case(row)
    call = make(rig, case, dtype, channels_last=columns and len(case.gpu) == 4, noise_train=noise)
    results = _run(kernels, call, columns, force)
    compare(call, results)
    assert_same(results, _run(kernels, call, columns, force), "the same again")


@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("rung", ROW_RUNGS)
@pytest.mark.parametrize("case", FORCED_ROWS)
def test_forced_rungs_of_the_rows_walk(rig, kernels, case, rung, dtype):
    _assert_served(rig, kernels, ROWS[case], False, ROW_RUNGS[rung], dtype)


@pytest.mark.parametrize("dtype", FORCED_DTYPES, ids=lambda d: str(d)[6:])
@pytest.mark.parametrize(
    ("case", "rung"),
    # groups of several columns are only ever streamed
    [(c, r) for c in FORCED_COLUMNS for r in COLUMN_RUNGS if "group" not in c or r == "streaming"],
)
def test_forced_rungs_of_the_columns_walk(rig, kernels, case, rung, dtype):
    _assert_served(rig, kernels, COLUMNS[case], True, COLUMN_RUNGS[rung], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("rung", LARGE)
@pytest.mark.parametrize("kind", ["layer", "batch"])
def test_forced_rungs_at_size(rig, kernels, kind, rung, dtype):
    row = {
        "layer": ("layer", rig.pick((13, 150_001), (3, 2500)), {"normalized_ndim": 1}),
        "batch": ("batch", rig.pick((37, 11, 64, 65), (5, 3, 9, 9)), {}),
    }[kind]
    _assert_served(rig, kernels, row, False, LARGE[rung], dtype, noise=1.0)


# Shapes for which a GPU with clusters takes each of its rungs in turn.
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
def test_rungs_that_the_ladder_chooses(rig, backend, case, last, dtype):
    check(make(rig, case, dtype, channels_last=last, noise_train=0.7))


def test_the_shapes_above_take_every_rung(rig):
    """So that no rung goes untested on this device without being named."""
    device = cuda.current_device()
    if device is None and cuda.missing() is None:
        device = cuda.DEVICE_MODELS["H200"]
    if device is None:
        pytest.skip("no GPU, and no compiled CUDA kernels whose ladder could be asked")
    rungs = set()
    for case in AUTOMATIC:
        for backward in (False, True):
            x = torch.empty(case.gpu, device="meta", dtype=torch.bfloat16)
            found = cuda.plan(
                x, case.kind, device, normalized_ndim=case.trailing, backward=backward
            )
            rungs.add(found.rung.split(",")[0])
    wanted = {"warp", "block", "co-operating blocks", "streaming"}
    wanted |= {"cluster"} if device.clusters else set()
    assert wanted <= rungs, f"no shape takes {', '.join(wanted - rungs)}"
