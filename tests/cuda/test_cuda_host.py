"""The CUDA kernels' source, run on the CPU: every tier, layout and storage type against float64.

``host_cuda/`` emulates a GPU with a fibre for each CUDA thread, shared memory and clusters
included. Thread orders forward, backward and shuffled must agree bit for bit, and leaving out any
barrier must change a result. ``host_cuda/host_cuda.h`` lists what the emulator does not model.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from host_cuda import harness
from host_cuda.cases import (
    COLUMN_TIERS,
    COLUMNS,
    DTYPES,
    FUSIONS,
    ORDERS,
    ROW_TIERS,
    ROWS,
    assert_close,
    check,
    compute_dtype,
    fuse,
    make,
    same,
)
from host_cuda.harness import Call, HostKernels, Tensor

from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and shutil.which("g++") and harness.cuda_include()),
    reason="needs Linux, g++ and the headers of the CUDA toolkit",
)


@pytest.fixture(scope="session")
def kernels() -> HostKernels:
    return HostKernels()


@pytest.fixture(autouse=True)
def _plain_run(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "kernels" in request.fixturenames:
        module = request.getfixturevalue("kernels")
        module.configure(0)
        module.device(4, 232448, True)


# --- every tier against float64 ----------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["plain", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tier", ROW_TIERS)
@pytest.mark.parametrize("case", ROWS)
def test_rows(kernels, case, tier, dtype, noise):
    check(kernels, *make(ROWS[case], dtype, noise_train=noise, force=ROW_TIERS[tier]))


@pytest.mark.parametrize("noise", [0.0, 0.7], ids=["plain", "noise"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("case", "tier"),
    # groups of several columns are always streamed
    [(c, r) for c in COLUMNS for r in COLUMN_TIERS if "group" not in c or r == "streaming"],
)
def test_columns(kernels, case, tier, dtype, noise):
    check(kernels, *make(COLUMNS[case], dtype, True, noise_train=noise, force=COLUMN_TIERS[tier]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("kind", "shape", "tier"),
    [
        ("batch", (700, 100), "grid"),
        ("batch", (700, 100), "streaming"),
        ("batch", (9, 3, 40, 40), "streaming"),
        ("group", (2, 12, 30, 30), "streaming"),
    ],
)
def test_many_blocks_to_a_group(kernels, kind, shape, tier, dtype):
    """More than a warp of partial sums a group."""
    options = {"num_groups": 4} if kind == "group" else {}
    columns = (kind, len(shape)) != ("batch", 4)
    for order in ORDERS[:2]:
        kernels.configure(order)
        call, g = make(
            (kind, shape, options), dtype, columns, noise_train=0.7,
            force={"tier": tier, "blocks": 37, "thread_groups": 1},
        )  # fmt: skip
        check(kernels, call, g)


@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize("clusters", [True, False])
def test_automatic_plans(kernels, multiprocessors, clusters):
    """With little shared memory, rows of ordinary lengths take several tiers."""
    tiers = set()
    for shared in (24000, 60000):
        kernels.device(multiprocessors, shared, clusters)
        for length in (64, 3000, 12000, 40000):
            case = ("layer", (2, length), {"normalized_ndim": 1})
            call, g = make(case, torch.float32, noise_train=1.0)
            call.weight = call.bias = None
            tiers.add(kernels.plan(call._problem(call.input, None), False)[0])
            check(kernels, call, g)
    assert len(tiers) >= 2


WAITING = {  # cases whose blocks wait for one another, by the tier of their plan
    "cluster": (("layer", (2, 12000), {"normalized_ndim": 1}), False, 60000),
    "grid": (("layer", (2, 190000), {"normalized_ndim": 1}), False, 60000),
    "tiles": (("batch", (40, 16, 4, 4), {}), True, 232448),
}
TIER_OF = {"cluster": 2, "grid": 3, "tiles": 3}


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize("case", WAITING)
def test_blocks_that_are_not_co_resident_are_never_launched(kernels, case, fused):
    """Their barriers would never open; a tier without them is planned instead."""
    shape, columns, shared = WAITING[case]

    def serve(**device):
        kernels.device(8, shared, True, **device)
        call, g = make(shape, torch.float32, columns, noise_train=1.0)
        if not columns:
            call.weight = call.bias = None
        tier = kernels.plan(call._problem(call.input, None), False)[0]
        check(kernels, fuse(call, FUSIONS["both"] if fused else ()), g)
        return tier

    assert serve() == TIER_OF[case]
    assert serve(co_resident=1) in (1, 4)  # a block, or streaming
    if TIER_OF[case] == 3:
        assert serve(cooperative=False) == 4
        assert serve(refuse_cooperative=True) == 3  # planned, refused at the launch, and streamed


def _run(kernels: HostKernels, call: Call, g: Tensor) -> list[list[int]]:
    """Checks both passes; returns the blocks of each launch, forward and backward."""
    kernels.grids()
    found = []
    output, stats = call.forward(kernels)
    found.append(kernels.grids())
    du, *_ = call.backward(kernels, g, stats)
    found.append(kernels.grids())
    want = call.expected(g)
    assert_close(output, want[0], call.input.dtype, "output")
    assert_close(du, want[2], call.input.dtype, "gradient of the input", 4)
    return found


@pytest.mark.parametrize("shape", [(32, 64), (100, 40)], ids=str)
def test_a_thread_group_has_no_blocks_without_rows(kernels, shape):
    """A block takes 16 rows at a time of a tile of 32 columns; the device could run 258 blocks."""
    kernels.device(132, 232448, True)
    blocks = -(-shape[0] // 16) * -(-shape[1] // 32)
    forward, backward = _run(kernels, *make(("batch", shape, {}), torch.float32, True))
    assert forward == [blocks]
    assert backward[0] == blocks


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_evaluation_is_one_launch(kernels, columns):
    """Of all groups, also where the L2 cache does not hold them."""
    kernels.device(132, 232448, True)
    large = Call("batch", torch.empty(256, 256, 56, 56), frozen=torch.empty(len(Row), 256))
    _, threads, blocks, groups, _ = kernels.plan(large._problem(large.input, None), False)
    assert groups == 256
    assert blocks == -(-256 * 56 * 56 // (threads * 16 * 4))  # a thread takes 16 chunks of 4

    call, _ = make(("batch", (3, 8, 40, 40), {}), torch.float32, columns)
    call.frozen = torch.zeros(len(Row), 8)
    call.frozen[Row.RSTD], call.frozen[Row.LMBDA] = 0.7, torch.linspace(0.5, 1.5, 8)
    kernels.grids()
    output, _ = call.forward(kernels)
    assert len(kernels.grids()) == 1
    assert_close(output, call.expected()[0], torch.float32, "output")


@pytest.mark.parametrize("shared", [48_192, 56_384])
def test_a_cluster_has_shared_memory_for_the_totals_of_doubles(kernels, shared):
    """A block of a cluster has 16 KB of totals of its warps beside the chunks of its group."""
    kernels.device(132, shared, True)
    clusters = 0
    for length in range(4000, 80_000, 1000):
        call, _ = make(("layer", (1, length), {"normalized_ndim": 1}), torch.float64)
        call.weight = call.bias = None
        for backward, planes in ((False, 1), (True, 3)):
            problem = call._problem(call.input, None) | {"grad_output": call._operand(call.input)}
            tier, threads, _, _, chunks = kernels.plan(problem, backward)
            clusters += tier == TIER_OF["cluster"]
            assert chunks * threads * 4 * 8 * planes + 16_384 <= shared
    assert clusters > 10


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
@pytest.mark.parametrize(
    ("case", "tier", "columns"),
    [(c, r, False) for c in ("layer", "batch") for r in ROW_TIERS]
    + [("batch", r, True) for r in COLUMN_TIERS],
)
def test_thread_orders_agree_bitwise(kernels, case, tier, columns, fused):
    dtype = torch.float32 if columns else torch.bfloat16
    names = FUSIONS["both"] if fused else ()
    call, g = _make_fused(case, tier, columns, dtype, names, noise_train=1.0)
    results = []
    for order in ORDERS:
        kernels.configure(order)
        results.append((*check(kernels, call, g), call.sum))
    assert all(same(results[0], r) for r in results[1:])


# --- barriers ----------------------------------------------------------------------------------


def programs() -> dict[str, tuple[Call, Tensor]]:
    """One call a tier, with two groups for each thread group one after the other."""
    layer = ("layer", (4, 600), {"normalized_ndim": 1})
    batch = ("batch", (3, 4, 16, 16), {})
    two = {"thread_groups": 2, "threads": 64}
    forces = {
        "block": (layer, {"tier": "block", **two}),
        "cluster": (batch, {"tier": "cluster", "blocks": 2, **two}),
        "grid": (batch, {"tier": "grid", "blocks": 2, **two}),
        "streaming": (batch, {"tier": "streaming", "blocks": 2, "thread_groups": 2}),
    }
    made = {
        name: make(case, torch.float32, noise_train=1.0, force=force, parameter_dtype=torch.float32)
        for name, (case, force) in forces.items()
    }
    for tier in ("streaming", "grid"):
        made[f"columns {tier}"] = make(
            ("batch", (40, 100, 2, 2), {}), torch.float32, True, noise_train=1.0,
            force={"tier": tier, "blocks": 2, "thread_groups": 2}, parameter_dtype=torch.float32,
        )  # fmt: skip
    half = ("instance", (3, 4, 16, 16), {})  # with reduce_partials()
    made["fold"] = make(half, torch.float32, force={"tier": "block"})
    return made


def run_quietly(kernels: HostKernels, call: Call, g: Tensor) -> tuple[Tensor, ...] | None:
    try:
        output, stats = call.forward(kernels)
        return (output, stats, *call.backward(kernels, g, stats))
    except RuntimeError:
        return None


def test_every_barrier_is_needed(kernels):
    """Leaving out any barrier changes a result, or ends in an error, in some thread order."""
    needed, met = set(), set()
    for call, g in programs().values():
        kernels.configure(0, True)
        right = run_quietly(kernels, call, g)
        assert right is not None
        sites = set(kernels.sites())
        assert sites
        met |= sites
        for site in sites - needed:
            for order in ORDERS:
                kernels.configure(order, True, site)
                got = run_quietly(kernels, call, g)
                if got is None or not same(right, got):
                    needed.add(site)
                    break
    assert met == needed, "left out, nothing changes"
    written = sum(
        len(re.findall(r"(?:__syncthreads|cluster_sync|wait_for_arrivals)\(", line))
        for path in harness.CUDA.glob("*.cuh")
        if path.name != "runtime.cuh"
        for line in path.read_text().splitlines()
    )
    assert len(met) == written, "a barrier that no program of this test meets"


# --- shapes and strides ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 37, 760, 1128, 5000])
def test_row_lengths(kernels, length, dtype):
    check(kernels, *make(("layer", (3, length), {"normalized_ndim": 1}), dtype, noise_train=1.0))


@pytest.mark.slow
@pytest.mark.parametrize("length", [8191, 65536, 262144])
def test_long_rows(kernels, length):
    kernels.device(132, 232448, True)
    check(
        kernels,
        *make(("layer", (2, length), {"normalized_ndim": 1}), torch.bfloat16, noise_train=1.0),
    )


@pytest.mark.parametrize("tier", ["block", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_and_strided_rows(kernels, offset, dtype, tier):
    wide = torch.randn(4, 300 + offset + 3).to(dtype)
    case = ("layer", (4, 296), {"normalized_ndim": 1})
    call, g = make(case, dtype, noise_train=1.0, force={"tier": tier})
    call.input = wide[:, offset : offset + 296]
    check(kernels, call, g)
    call.input = wide[:, offset : offset + 296].contiguous()
    check(kernels, call, torch.randn(4, 299).to(dtype)[:, 2:298])


def test_strided_images(kernels):
    wide = torch.randn(6, 10, 8, 8)
    call, g = make(("batch", (6, 4, 8, 8), {}), torch.float32, noise_train=1.0)
    call.input = wide[:, 3:7]
    check(kernels, call, g)
    channels_last = wide.to(memory_format=torch.channels_last)
    call.columns = True
    call.input = channels_last[:, 4:8]
    check(kernels, call, g.to(memory_format=torch.channels_last))
    call.input = channels_last[:, 3:7]
    check(kernels, call, g.to(memory_format=torch.channels_last))


# --- sizes beyond 32 bits ----------------------------------------------------------------------


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_offsets_beyond_32_bits(kernels, dtype, columns):
    """The addresses of elements of a tensor that is too large to allocate here."""
    outer, inner, runs, length = 3, 5, 70_001, 4096
    run = 16 * 5 * 4096 * 5  # elements from one run to the next: the last one begins beyond 2^36
    strides = (runs * run, 1 if columns else length, run)
    geometry = (columns, outer, inner, runs, 1 if columns else length)
    numbers = (harness.STORAGE[dtype], *geometry, *(s * 3 for s in strides), *strides)
    per_chunk = 4 if columns or dtype == torch.float64 else 16 // dtype.itemsize
    last = 0 if columns else 4096 - 8
    for o, i, r, at in [(0, 0, 0, 0), (2, 4, 70_000, last), (1, 3, 69_999, 0)]:
        element = o * strides[0] + i * strides[1] + r * run + at
        start = 3 * (o * strides[0] + r * run)
        noise = start + (i if columns else 3 * i * strides[1] + at)
        chunk = 0 if columns else at // per_chunk
        got = kernels.offsets((*numbers, o * inner + i, r, chunk))
        assert got == (element * dtype.itemsize, noise // 4), (o, i, r, at)


def test_sizes_that_are_refused(kernels):
    """Sizes that exceed 32-bit counters, by a sentence and by the launchers."""
    call, _ = make(ROWS["layer"], torch.float32)
    problem = call._problem(call.input, None)
    assert kernels.refusal(problem) is None
    for geometry, said in (
        ([0, 2**20, 2**12, 1, 8], "4294967296 groups"),
        ([0, 1, 1, 2**20, 2**15], "chunks"),
        ([1, 1, 2**21, 4, 2**10], "2147483648 columns"),
        ([1, 1, 4, 2**31, 1], "2147483648 rows"),
    ):
        refused = problem | {"geometry": geometry}
        assert said in kernels.refusal(refused)
        with pytest.raises(RuntimeError, match="CUDA error 1"):
            kernels.forward(refused)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_parameter_gradients_alone(kernels, columns):
    call, g = make((COLUMNS if columns else ROWS)["batch"], torch.float32, columns, noise_train=1.0)
    _, stats = call.forward(kernels)
    du, dw, db = call.backward(kernels, g, stats, needs_input=False)
    want = call.expected(g)
    assert du is None
    assert_close(dw, want[3], torch.float32, "weight", 4)
    assert_close(db, want[4], torch.float32, "bias", 4)


# --- fused operations --------------------------------------------------------------------------


FUSED_ROWS = ("layer", "layer-ragged", "batch-ragged", "group", "instance-1d")
FUSED_COLUMNS = ("batch", "batch-ragged", "group", "instance")


def _fused_layouts() -> list[tuple[str, str, bool]]:
    """Every tier of both layouts; groups of several columns are always streamed."""
    rows = [(c, r, False) for c in FUSED_ROWS for r in ROW_TIERS]
    return rows + [
        (c, r, True)
        for c in FUSED_COLUMNS
        for r in COLUMN_TIERS
        if c != "group" or r == "streaming"
    ]


def _make_fused(case, tier, columns, dtype, names, **options) -> tuple[Call, Tensor]:
    force = (COLUMN_TIERS if columns else ROW_TIERS)[tier]
    call, g = make((COLUMNS if columns else ROWS)[case], dtype, columns, force=force, **options)
    return fuse(call, names), g


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "tier", "columns"), _fused_layouts())
def test_fused(kernels, case, tier, columns, dtype):
    for names in FUSIONS.values():
        check(kernels, *_make_fused(case, tier, columns, dtype, names, noise_train=0.7))
    check(kernels, *_make_fused(case, tier, columns, dtype, FUSIONS["both"]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "tier", "columns"), _fused_layouts())
def test_fused_equals_separate_operations_bitwise(kernels, case, tier, columns, dtype):
    """Without rounding to storage; with noise, because plain kernels without it skip a round."""
    call, g = _make_fused(case, tier, columns, dtype, FUSIONS["both"], noise_train=0.7)
    output, stats = call.forward(kernels)
    gradients = call.backward(kernels, g, stats)
    steps = replace(
        call, input=call.sum, residual=None, relu=False, addend=None, grad_sum=None, sum=None
    )
    plain, plain_stats = steps.forward(kernels)
    masked = torch.empty_like(g).copy_(torch.where(output <= 0, 0.0, g))
    du, *parameters = steps.backward(kernels, masked, stats)
    assert same((call.sum,), (call.input + call.addend,))
    assert same((output, stats), ((plain + call.residual).relu(), plain_stats))
    assert same(gradients, (du + call.grad_sum, *parameters))


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("tier", ["grid", "streaming"])
@pytest.mark.parametrize("odd", ["residual", "addend", "grad_sum", "gradient"])
def test_fused_tensors_of_any_offset_and_stride(kernels, tier, columns, odd):
    """A tensor that is not aligned makes the whole pass ragged."""

    def shifted(t: Tensor) -> Tensor:
        wide = torch.empty(t.size(0), t.size(1) + 3, *t.shape[2:]).to(t.dtype)
        if columns:
            wide = wide.to(memory_format=torch.channels_last)
        return wide[:, 1 : 1 + t.size(1)].copy_(t)

    case = ("batch", (6, 16, 4, 4), {})
    force = (COLUMN_TIERS if columns else ROW_TIERS)[tier]
    call, g = make(case, torch.bfloat16, columns, force=force, noise_train=0.7)
    call = fuse(call, FUSIONS["both"])
    if odd == "gradient":
        g = shifted(g)
    else:
        setattr(call, odd, shifted(getattr(call, odd)))
    check(kernels, call, g)


@pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
def test_frozen_statistics_with_an_epilogue(kernels, columns):
    call, g = make((COLUMNS if columns else ROWS)["batch"], torch.bfloat16, columns)
    call.frozen = torch.zeros(len(Row), call.groups)
    call.frozen[Row.RSTD] = torch.rand(call.groups) + 0.5
    call.frozen[Row.LMBDA] = torch.linspace(-1, 3, call.groups)
    check(kernels, fuse(call, ("residual", "relu")), g)


@pytest.mark.parametrize(
    ("case", "tier", "columns"), [("layer", "block", False), ("batch", "grid", True)]
)
def test_a_nan_passes_through_the_activation(kernels, case, tier, columns):
    call, g = _make_fused(case, tier, columns, torch.float32, ("relu", "residual"))
    call.residual[1, 2] = float("nan")
    output, stats = call.forward(kernels)
    assert output[1, 2].isnan().all()
    assert output.isnan().sum() == call.residual.isnan().sum()
    *_, db = call.backward(kernels, g, stats)
    masked = torch.where(output <= 0, 0.0, g)
    dims = 0 if call.kind == "layer" else (0, 2, 3)
    torch.testing.assert_close(db, masked.sum(dims))


# --- hard data ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", ["block", "grid", "streaming"])
def test_constant_and_broken_groups(kernels, tier):
    call, g = make(ROWS["layer"], torch.float32, noise_train=1.0, force=ROW_TIERS[tier])
    x = call.input
    x[1] = 3.3
    x[2, 7] = float("nan")
    x[3, 8] = float("inf")
    x[4] *= 1e20  # finite, but its squares are not
    output, stats = call.forward(kernels)
    assert torch.equal(output[1], call.bias)
    assert stats[Row.LMBDA, 1] == 1
    assert output[2:].isnan().all()
    assert output[0].isfinite().all()
    du, _, _ = call.backward(kernels, g, stats)
    assert du[:2].isfinite().all()
    assert du[[2, 4]].isnan().all()


@pytest.mark.parametrize("tier", COLUMN_TIERS)
def test_a_column_beyond_the_range_is_nan(kernels, tier):
    call, g = make(COLUMNS["batch"], torch.float32, True, noise_train=1.0, force=COLUMN_TIERS[tier])
    call.input[:, 1] *= 1e20
    output, stats = call.forward(kernels)
    du, _, _ = call.backward(kernels, g, stats)
    for tensor in (output, du):
        assert tensor[:, 1].isnan().all()
        assert tensor[:, [0, *range(2, 16)]].isfinite().all()


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize(
    ("tier", "columns"), [(r, False) for r in ROW_TIERS] + [(r, True) for r in COLUMN_TIERS]
)
def test_large_offsets_cost_no_digits(kernels, tier, columns, offset):
    force = (COLUMN_TIERS if columns else ROW_TIERS)[tier]
    call, g = make((COLUMNS if columns else ROWS)["batch"], torch.float32, columns, force=force)
    call.input = call.input + offset
    output, stats = call.forward(kernels)
    want = call.expected(g)
    assert_close(output, want[0], torch.float32, "output", 4)
    assert_close(stats[Row.RSTD], want[1][Row.RSTD], torch.float32, "rstd", 4)


NEIGHBOURS = {  # values of a column between others
    "nan": lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
    "infinity": lambda x: x.index_fill(0, torch.tensor([1]), float("inf")),
    "lambda near 0": lambda x: torch.empty(x.shape).exponential_(),
    "lambda near 2": lambda x: -torch.empty(x.shape).exponential_(),
}


def _alone_and_beside(
    kernels: HostKernels, call: Call, g: Tensor, spoil: Callable[[Call, Tensor], None]
) -> tuple[Tensor, ...]:
    """The kernels must give the same bits for all other groups before and after spoil(call, mask of
    channels) changes every third group. Returns the statistics of the others and the spoilt."""
    channels = call.input.size(1)
    groups = call.num_groups or channels  # of a sample
    group = torch.arange(groups) % 3 == 1
    column = group.repeat_interleave(channels // groups)
    group = group.repeat(call.groups // groups)
    found = []
    for spoilt in (False, True):
        if spoilt:
            spoil(call, column)
        output, stats = call.forward(kernels)
        du, dw, db = call.backward(kernels, g, stats)
        by_column = (output[:, ~column], du[:, ~column], dw[~column], db[~column])
        found.append((stats, (stats[:, ~group], *by_column)))
    (stats, alone), (spoilt_stats, beside) = found
    assert all(t.isfinite().all() for t in alone)
    names = ("statistics", "output", "du", "dweight", "dbias")
    for name, x, y in zip(names, alone, beside, strict=True):
        assert torch.equal(x, y), name
    return stats[:, ~group], spoilt_stats[:, group]


def _is_plain(stats: Tensor) -> Tensor:
    lmbda = stats[Row.LMBDA]
    return (lmbda.abs() >= 0.25) & ((2 - lmbda).abs() >= 0.25)


BESIDE = [
    (c, r)
    for c in ("batch", "batch-ragged", "batch-2d", "instance", "group")
    for r in COLUMN_TIERS
    if c != "group" or r == "streaming"
]


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "tier"), BESIDE)
def test_a_column_does_not_depend_on_its_neighbours(kernels, case, tier, dtype, neighbour):
    """Bitwise, although neighbouring columns run the code of the most precise path among them."""

    def spoil(call: Call, column: Tensor) -> None:
        call.input = call.input.clone()
        call.input[:, column] = NEIGHBOURS[neighbour](call.input[:, column]).to(call.input.dtype)

    for noise in (0.0, 0.7):
        force = COLUMN_TIERS[tier]
        call, g = make(COLUMNS[case], dtype, True, noise_train=noise, force=force)
        call.input = torch.randn_like(call.input)
        others, spoilt = _alone_and_beside(kernels, call, g, spoil)
        assert _is_plain(others).any()
        assert not _is_plain(spoilt).all()


@pytest.mark.parametrize("lmbda", [float("nan"), 0.0, 0.1, 2.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("case", "tier"), [b for b in BESIDE if b[0].startswith("batch")])
def test_a_frozen_column_does_not_depend_on_its_neighbours(kernels, case, tier, dtype, lmbda):
    def spoil(call: Call, column: Tensor) -> None:
        call.frozen = call.frozen.clone()
        call.frozen[Row.LMBDA, column] = lmbda

    for noise in (0.0, 0.7):
        force = COLUMN_TIERS[tier]
        call, g = make(COLUMNS[case], dtype, True, noise_train=noise, force=force)
        call.frozen = torch.zeros(len(Row), call.groups, dtype=compute_dtype(dtype))
        call.frozen[Row.RSTD] = 0.7
        call.frozen[Row.LMBDA] = torch.linspace(0.5, 1.5, call.groups)
        call.frozen[Row.NOISE_SCALE] = 0.4
        _alone_and_beside(kernels, call, g, spoil)


LAWS = {
    "exponential": lambda n: torch.empty(n).exponential_(),
    "relu": lambda n: torch.randn(n).relu(),
    "one hot": lambda n: torch.nn.functional.one_hot(torch.tensor(3), n).float(),
    "outlier": lambda n: torch.cat([torch.tensor([1000.0]), torch.randn(n - 1)]),
    "lognormal": lambda n: (1.5 * torch.randn(n)).exp(),
    "two values": lambda n: torch.randn(n).sign(),
}


@pytest.mark.parametrize("law", LAWS)
def test_hard_laws(kernels, law):
    """Exponents near 0 and far from 1. Wider bounds: lambda is ill-conditioned here."""
    call, g = make(("layer", (2, 1200), {"normalized_ndim": 1}), torch.float32, noise_train=1.0)
    call.input = torch.stack([LAWS[law](1200), -LAWS[law](1200)])
    output, stats = call.forward(kernels)
    want = call.expected(g)
    assert_close(output, want[0], torch.float32, "output", 8)
    du, _, _ = call.backward(kernels, g, stats)
    assert_close(du, want[2], torch.float32, "gradient of the input", 25)


# --- sanitizers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """This file again in another process, with all kernels under ASan and UBSan."""
    libraries = [
        subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True
        ).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = dict(
        os.environ,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        NORMNORM_HOST_CUDA_SANITIZED="1",
    )
    # The tests of neighbouring columns are slow under sanitizers and reach no other code.
    chosen = ["-m", "not slow", "-k", "not neighbours"]
    pytest_ = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, __file__]
    command = [sys.executable, *pytest_]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=harness.ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
