"""The CUDA kernels' source, run on the CPU: every tier, layout and storage type against float64.

``host_cuda/`` emulates a GPU with a fibre for each CUDA thread, shared memory and clusters
included. Thread orders forward, backward and shuffled must agree bit for bit, and leaving out any
barrier must change a result. ``host_cuda/host_cuda.h`` lists what the emulator does not model.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from host_cuda import torch_library
from host_cuda.torch_library import Host
from oracle import Case, compute_dtype
from raw_ops import (
    CPU_UNIT,
    assert_close,
    assert_fused_equals_steps,
    both_passes,
    channels_last,
    check,
    compare,
    forward_pass,
    operands,
    same,
)
from shards import sharded_passes
from tiers import COLUMN_TIERS, COLUMNS, DTYPES, FUSIONS, ROW_TIERS, ROWS, case_and_plan, layouts
from torch import Tensor

from normnorm.config import packed
from normnorm.statistics import Row

pytestmark = pytest.mark.skipif(
    torch_library.missing() is not None, reason=str(torch_library.missing())
)
ORDERS = (0, 1, 2, 3)
NOISE = {"noise_train": 0.7}
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_layout = pytest.mark.parametrize("columns", [False, True], ids=["rows", "columns"])
Operands = dict[str, Tensor]


@pytest.fixture
def kernels() -> Iterator[Host]:
    with torch_library.served_by_host_run():
        host = torch_library.load()
        yield host
        host.reset()


def make(case: Case, dtype: torch.dtype = torch.float32, columns: bool = False, **options):
    """Operands with a skewed input, so that lambda is away from 1."""
    return operands(case, dtype, columns, "exponential", **options)


# --- every tier against float64 ----------------------------------------------------------------


@each_dtype
@pytest.mark.parametrize(("case", "tier", "columns"), layouts(tuple(ROWS), tuple(COLUMNS)))
def test_every_tier(kernels, case, tier, columns, dtype):
    case, plan = case_and_plan(case, tier, columns)
    kernels.force(**plan)
    t = make(case, dtype, columns)
    check("cuda", case, t, (), columns)
    check("cuda", case, t, (), columns, **NOISE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("case", "tier", "columns"),
    [
        (Case("batch", (700, 100)), "grid", True),
        (Case("batch", (700, 100)), "streaming", True),
        (Case("batch", (9, 3, 40, 40)), "streaming", False),
        (Case("group", (2, 12, 30, 30), num_groups=4), "streaming", True),
    ],
)
def test_many_blocks_to_a_group(kernels, case, tier, columns, dtype):
    """More than a warp of partial sums a group."""
    kernels.force(tier=tier, blocks=37, thread_groups=1)
    for order in ORDERS[:2]:
        kernels.configure(order)
        check("cuda", case, make(case, dtype, columns), (), columns, **NOISE)


def without_parameters(t: Operands) -> Operands:
    return {name: each for name, each in t.items() if name not in ("weight", "bias")}


def tier_of(kernels: Host) -> str:
    """That of a layer without parameters, by its launches since the last call."""
    launches = kernels.launches()
    if launches[0].cooperative:
        return "grid"
    if launches[0].cluster > 1:
        return "cluster"
    return "block" if len(launches) == 2 else "streaming"


@pytest.mark.parametrize("multiprocessors", [2, 132])
@pytest.mark.parametrize("clusters", [True, False])
def test_automatic_plans(kernels, multiprocessors, clusters):
    """With little shared memory, rows of ordinary lengths take several tiers."""
    tiers = set()
    for shared in (24000, 60000):
        kernels.device(multiprocessors, shared, clusters)
        for length in (64, 3000, 12000, 40000):
            case = Case("layer", (2, length), normalized_ndim=1)
            check("cuda", case, without_parameters(make(case)), **NOISE)
            tiers.add(tier_of(kernels))
    assert len(tiers) >= 2


WAITING = {  # cases whose blocks wait for one another, by the tier of their plan
    "cluster": (Case("layer", (2, 12000), normalized_ndim=1), False, 60000),
    "grid": (Case("layer", (2, 190000), normalized_ndim=1), False, 60000),
    "tiles": (Case("batch", (40, 16, 4, 4)), True, 232448),
}


@pytest.mark.parametrize("fused", [(), FUSIONS[2]], ids=["plain", "fused"])
@pytest.mark.parametrize("name", WAITING)
def test_blocks_that_are_not_co_resident_are_never_launched(kernels, name, fused):
    """Their barriers would never open; a tier without them is planned instead."""
    case, columns, shared = WAITING[name]
    t = make(case, columns=columns)
    t = t if columns else without_parameters(t)

    def serve(**device) -> str:
        kernels.device(8, shared, True, **device)
        check("cuda", case, t, fused, columns, **NOISE)
        return tier_of(kernels)

    planned = "cluster" if name == "cluster" else "grid"
    assert serve() == planned
    assert serve(co_resident=1) in ("block", "streaming")
    if planned == "grid":
        assert serve(cooperative=False) == "streaming"
        assert serve(refuse_cooperative=True) == "streaming"  # planned, and refused at the launch


@pytest.mark.parametrize("shape", [(32, 64), (100, 40)], ids=str)
def test_a_thread_group_has_no_blocks_without_rows(kernels, shape):
    """A block takes 16 rows at a time of a tile of 32 columns; the device could run 258 blocks."""
    kernels.device(132, 232448, True)
    check("cuda", Case("batch", shape), make(Case("batch", shape)))
    blocks = -(-shape[0] // 16) * -(-shape[1] // 32)
    assert [launch.blocks for launch in kernels.launches()][:2] == [blocks, blocks]


def test_blocks_beyond_those_that_run_at_once_are_few(kernels):
    """Nine tiles, where eight blocks run at once: 36 blocks, though 72 would waste less."""
    kernels.device(2, 232448, True)
    kernels.force(tier="streaming")
    case = Case("instance", (9, 32, 8, 16))
    check("cuda", case, make(case, columns=True), (), True)
    assert kernels.launches()[0].blocks == 36


@pytest.mark.parametrize("fused", [(), FUSIONS[2]], ids=["plain", "fused"])
@pytest.mark.parametrize(("case", "tier", "columns"), layouts(("layer", "batch"), ("batch",)))
def test_thread_orders_agree_bitwise(kernels, case, tier, columns, fused):
    case, plan = case_and_plan(case, tier, columns)
    kernels.force(**plan)
    t = make(case, torch.float32 if columns else torch.bfloat16, columns)
    results = []
    for order in ORDERS:
        kernels.configure(order)
        results.append(check("cuda", case, t, fused, columns, **NOISE))
    assert all(same(results[0], r) for r in results[1:])


# --- barriers ----------------------------------------------------------------------------------

_TWO = {"thread_groups": 2, "threads": 64}
_LAYER, _BATCH = Case("layer", (4, 600), normalized_ndim=1), Case("batch", (3, 4, 16, 16))
_COLUMNS = Case("batch", (40, 100, 2, 2))
# A case a tier, with two groups for each thread group one after the other where it is resident; the
# last has reduce_partials().
PROGRAMS = (
    (_LAYER, False, {"tier": "block", **_TWO}),
    (_BATCH, False, {"tier": "cluster", "blocks": 2, **_TWO}),
    (_BATCH, False, {"tier": "grid", "blocks": 2, **_TWO}),
    (_BATCH, False, {"tier": "streaming", "blocks": 2}),
    (_COLUMNS, True, {"tier": "streaming", "blocks": 2}),
    (_COLUMNS, True, {"tier": "grid", "blocks": 2, "thread_groups": 2}),
    (Case("instance", (3, 4, 16, 16)), False, {"tier": "block"}),
)


def test_every_barrier_is_needed(kernels):
    """Leaving out any barrier changes a result, or ends in an error, in some thread order."""
    needed, met = set(), set()
    for case, columns, plan in PROGRAMS:
        t = make(case, columns=columns)
        kernels.force(**plan)

        def results(order: int, skip: str = "") -> tuple[Tensor, ...] | None:
            kernels.configure(order, True, skip)
            try:
                return both_passes("cuda", case, t, (), columns, noise_train=1.0)  # noqa: B023
            except RuntimeError:
                return None

        right = results(0)
        assert right is not None
        sites = kernels.sites()
        assert sites
        met |= sites
        for site in sites - needed:
            for order in ORDERS:
                got = results(order, site)
                if got is None or not same(right, got):
                    needed.add(site)
                    break
    assert met == needed, "left out, nothing changes"
    written = sum(
        len(re.findall(r"(?:__syncthreads|cluster_sync|wait_for_arrivals)\(", line))
        for path in (torch_library.CSRC / "cuda").glob("*.cuh")
        if path.name != "runtime.cuh"
        for line in path.read_text().splitlines()
    )
    assert len(met) == written, "a barrier that no program of this test meets"


# --- shapes and strides ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 31, 37, 760, 1128, 5000])
def test_row_lengths(kernels, length, dtype):
    case = Case("layer", (3, length), normalized_ndim=1)
    check("cuda", case, make(case, dtype), **NOISE)


@pytest.mark.parametrize("tier", ["block", "streaming"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [1, 4, 8])
def test_misaligned_and_strided_rows(kernels, offset, dtype, tier):
    case = Case("layer", (4, 296), normalized_ndim=1)
    kernels.force(tier=tier)
    t, wide = make(case, dtype), torch.randn(4, 300 + offset + 3).to(dtype)
    for odd in ("x", "g"):
        check("cuda", case, {**t, odd: wide[:, offset : offset + 296]}, **NOISE)


OPERANDS = ("x", "residual", "g", "grad_sum")


@each_layout
@pytest.mark.parametrize("tier", ["grid", "streaming"])
@pytest.mark.parametrize("odd", OPERANDS)
def test_tensors_of_any_offset_and_stride(kernels, tier, columns, odd):
    """A tensor that is not aligned makes the whole pass ragged."""
    case = Case("batch", (6, 16, 4, 4))
    kernels.force(**(COLUMN_TIERS if columns else ROW_TIERS)[tier])
    t = make(case, torch.bfloat16, columns)
    wide = torch.zeros(6, 19, 4, 4, dtype=torch.bfloat16)
    wide = channels_last(wide) if columns else wide
    t[odd] = wide[:, 1:17].copy_(t[odd])
    for fused in ((), *FUSIONS):
        check("cuda", case, t, fused, columns, **NOISE)


# --- sizes beyond 32 bits ----------------------------------------------------------------------


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_offsets_beyond_32_bits(kernels, dtype, columns):
    """The addresses of elements of a tensor that is too large to allocate here."""
    outer, inner, runs, length = 3, 5, 70_001, 4096
    run = 16 * 5 * 4096 * 5  # elements from one run to the next: the last one begins beyond 2^36
    strides = (runs * run, 1 if columns else length, run)
    geometry = (columns, outer, inner, runs, 1 if columns else length)
    storage = (torch.float32, torch.float64, torch.bfloat16).index(dtype)
    numbers = (storage, *geometry, *(s * 3 for s in strides), *strides)
    per_chunk = 4 if dtype == torch.float64 else 16 // dtype.itemsize
    last = 0 if columns else 4096 - 8
    for o, i, r, at in [(0, 0, 0, 0), (2, 4, 70_000, last), (1, 3, 69_999, 0)]:
        element = o * strides[0] + i * strides[1] + r * run + at
        start = 3 * (o * strides[0] + r * run)
        noise = start + (i if columns else 3 * i * strides[1] + at)
        chunk = at // per_chunk
        got = kernels.offsets((*numbers, o * inner + i, r, chunk))
        assert got == (element * dtype.itemsize, noise // per_chunk), (o, i, r, at)


@pytest.mark.parametrize(
    ("geometry", "said"),
    [
        ([0, 1, 5, 1, 2400], ""), ([0, 2**20, 2**12, 1, 8], "4294967296 groups"),
        ([0, 1, 1, 2**20, 2**15], "chunks"), ([1, 1, 2**21, 4, 2**10], "2147483648 columns"),
        ([1, 1, 4, 2**31, 1], "2147483648 rows"),
    ],
)  # fmt: skip
def test_sizes_that_exceed_32_bit_counters_are_refused(kernels, geometry, said):
    refusal = kernels.refusal(geometry)
    assert said in refusal if said else not refusal


# --- fused operations --------------------------------------------------------------------------

FUSED = layouts(
    ("layer", "layer-ragged", "batch-ragged", "group", "instance-1d"),
    ("batch", "batch-ragged", "group", "instance"),
)


@each_dtype
@pytest.mark.parametrize(("case", "tier", "columns"), FUSED)
def test_fused(kernels, case, tier, columns, dtype):
    case, plan = case_and_plan(case, tier, columns)
    kernels.force(**plan)
    t = make(case, dtype, columns)
    for fused in FUSIONS:
        check("cuda", case, t, fused, columns, **NOISE)
    check("cuda", case, t, FUSIONS[2], columns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("case", "tier", "columns"), FUSED)
def test_fused_equals_separate_operations_bitwise(kernels, case, tier, columns, dtype):
    """With noise, because plain kernels without it skip a round."""
    case, plan = case_and_plan(case, tier, columns)
    kernels.force(**plan)
    assert_fused_equals_steps("cuda", case, make(case, dtype, columns), columns, **NOISE)


# --- one round at a time, for synchronised layers ------------------------------------------------

ROUNDS = [
    (case, columns)
    for case, tier, columns in layouts(tuple(ROWS), tuple(COLUMNS))
    if case.startswith("batch") and tier == "streaming"
]
RESIDUAL, RELU = ("residual",), ("relu",)


@each_dtype
@pytest.mark.parametrize(("case", "columns"), ROUNDS)
def test_rounds(kernels, case, columns, dtype):
    """With noise over the whole batch, and without over shards, one of them empty."""
    case = (COLUMNS if columns else ROWS)[case]
    t, size = make(case, dtype, columns), case.shape[0]
    last = columns and len(case.shape) > 2

    def check_rounds(t, sizes, fused, **options) -> None:
        got = sharded_passes("cuda", case, t, sizes, fused, last, **options)
        if len(sizes) == 1:
            assert got[0].stride() == got[2].stride() == t["x"].stride()
        compare(case, t, fused, last, got, **options)

    for fused in ((), FUSIONS[0]):
        check_rounds(t, [size], fused, **NOISE)
    check_rounds(without_parameters(t), [size], (), **NOISE)
    kernels.force(tier="streaming", blocks=3, thread_groups=2)
    t["weight"][1] = 0.0
    for fused in (RESIDUAL, RELU):
        check_rounds(t, [1, 0, size - 1], fused)


def test_the_launches_of_rounds(kernels):
    """A round and its sums, of which the output has none, and the gradient's are given."""
    case = ROWS["batch"]
    for options, rounds in ((NOISE, 7), ({}, 5)):
        sharded_passes("cuda", case, make(case), [case.shape[0]], **options)
        assert len(kernels.launches()) == 2 * rounds - 1


@each_layout
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rounds_over_equal_numbers_give_exact_zeros(kernels, columns, dtype):
    case = Case("batch", (21, 3, 5, 7))
    t = without_parameters(make(case, dtype, columns))
    t["x"] = torch.full_like(t["x"], 0.1)
    y, stats, *_ = sharded_passes("cuda", case, t, [2, 19], (), columns, **NOISE)
    assert (y == 0).all()
    assert (stats[Row.LMBDA] == 1).all()


@each_layout
def test_rounds_in_any_thread_order(kernels, columns):
    case = (COLUMNS if columns else ROWS)["batch"]
    results = []
    for order in ORDERS:
        kernels.configure(order)
        t = make(case, columns=columns)
        results.append(sharded_passes("cuda", case, t, [case.shape[0]], (), columns, **NOISE))
    assert all(same(results[0], each) for each in results[1:])


@pytest.mark.parametrize(
    "changed",
    [
        {"number": 0}, {"number": 6}, {"sums": None}, {"sums": torch.zeros(3, 5)},
        {"sums": torch.zeros(5, 3, dtype=torch.float64).T}, {"stats": torch.zeros(8, 4)},
    ],
    ids=["all rounds", "a gradient's round", "no sums", "dtype", "strides", "shape"],
)  # fmt: skip
def test_a_round_refuses_what_does_not_fit(kernels, changed):
    case = ROWS["batch"]
    t = make(case)
    given = {"stats": torch.zeros(8, 5), "sums": torch.zeros(3, 5, dtype=torch.float64)}
    given |= {"number": 1, **changed}
    settings = packed(case.config("cuda"), given["number"])
    with pytest.raises((ValueError, RuntimeError), match="do not fit the"):
        torch.ops.normnorm_cuda.round_(
            t["x"], given["stats"], given["sums"], *(None,) * 7, *settings
        )


# --- frozen statistics and hard data -------------------------------------------------------------


@pytest.mark.parametrize("fused", [(), FUSIONS[0]], ids=["plain", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_layout
def test_frozen_statistics_take_one_launch_beside_their_packing(kernels, columns, dtype, fused):
    kernels.device(132, 232448, True)
    case = Case("batch", (3, 8, 40, 40))
    running = (torch.randn(8), torch.rand(8) + 0.5, torch.linspace(-1, 3, 8))
    t = make(case, dtype, columns)
    forward_pass("cuda", case, t, fused, columns, running=running)
    assert len(kernels.launches()) == 2
    check("cuda", case, t, fused, columns, running=running)


@pytest.mark.parametrize("tier", ["block", "grid", "streaming"])
def test_constant_and_broken_groups(kernels, tier):
    case, plan = case_and_plan("layer", tier, False)
    kernels.force(**plan)
    t = make(case)
    x = t["x"]
    x[1] = 3.3
    x[2, 7] = float("nan")
    x[3, 8] = float("inf")
    x[4] *= 1e20  # finite, but its squares are not
    y, stats, du, *_ = both_passes("cuda", case, t, noise_train=1.0)
    assert torch.equal(y[1], t["bias"])
    assert stats[Row.LMBDA, 1] == 1
    assert y[2:].isnan().all()
    assert y[0].isfinite().all()
    assert du[:2].isfinite().all()
    assert du[[2, 4]].isnan().all()


@pytest.mark.parametrize("tier", COLUMN_TIERS)
def test_a_column_beyond_the_range_is_nan(kernels, tier):
    case, plan = case_and_plan("batch", tier, True)
    kernels.force(**plan)
    t = make(case, columns=True)
    t["x"][:, 1] *= 1e20
    y, _, du, *_ = both_passes("cuda", case, t, (), True, noise_train=1.0)
    for tensor in (y, du):
        assert tensor[:, 1].isnan().all()
        assert tensor[:, [0, *range(2, 16)]].isfinite().all()


@pytest.mark.parametrize("offset", [1e3, 1e6])
@pytest.mark.parametrize(("case", "tier", "columns"), layouts(("batch",), ("batch",)))
def test_large_offsets_cost_no_digits(kernels, case, tier, columns, offset):
    case, plan = case_and_plan(case, tier, columns)
    kernels.force(**plan)
    t = make(case, columns=columns)
    t["x"] += offset
    y, stats, *_ = both_passes("cuda", case, t, (), columns)
    exact = {name: each.double() for name, each in t.items()}
    want, want_stats, *_ = both_passes("reference", case, exact, (), columns)
    assert_close(y, want, CPU_UNIT, "output", times=4)
    assert_close(stats[Row.RSTD], want_stats[Row.RSTD], CPU_UNIT, "rstd", times=4)


NEIGHBOURS = {  # values of a column between others
    "nan": lambda x: x.index_fill(0, torch.tensor([1]), float("nan")),
    "infinity": lambda x: x.index_fill(0, torch.tensor([1]), float("inf")),
    "lambda near 0": lambda x: torch.empty(x.shape).exponential_(),
    "lambda near 2": lambda x: -torch.empty(x.shape).exponential_(),
}


def _alone_and_beside(
    case: Case, t: Operands, spoil: Callable[[dict, Tensor], None], options: dict
) -> tuple[Tensor, Tensor]:
    """The kernels must give the same bits for all other groups before and after spoil(operands and
    options, mask of channels) changes every third group. Returns the statistics of the others and
    the spoilt."""
    channels = case.shape[1]
    groups = case.num_groups or channels  # of a sample
    group = torch.arange(groups) % 3 == 1
    column = group.repeat_interleave(channels // groups)
    group = group.repeat(case.groups // groups)
    last = len(case.shape) > 2
    found = []
    for spoilt in (False, True):
        given = {**t, **options}
        if spoilt:
            spoil(given, column)
        operands = {name: given.pop(name) for name in t}
        y, stats, *gradients = both_passes("cuda", case, operands, (), last, **given)
        by_column = [r.movedim(min(1, r.dim() - 1), 0)[~column] for r in (y, *gradients)]
        found.append((stats, stats[:, ~group], *by_column))
    (_, *alone), (spoilt_stats, *beside) = found
    assert all(t.isfinite().all() for t in alone)
    for name, x, y in zip(("stats", "y", "du", "dw", "db"), alone, beside, strict=True):
        assert torch.equal(x, y), name
    return alone[0], spoilt_stats[:, group]


def _is_plain(stats: Tensor) -> Tensor:
    lmbda = stats[Row.LMBDA]
    return (lmbda.abs() >= 0.25) & ((2 - lmbda).abs() >= 0.25)


BESIDE = [
    (case, tier)
    for case, tier, _ in layouts((), ("batch", "batch-ragged", "batch-2d", "instance", "group"))
]


@pytest.mark.parametrize("neighbour", NEIGHBOURS)
@each_dtype
@pytest.mark.parametrize(("case", "tier"), BESIDE)
def test_a_column_does_not_depend_on_its_neighbours(kernels, case, tier, dtype, neighbour):
    """Bitwise, although neighbouring columns run the code of the most precise path among them."""

    def spoil(given: dict, column: Tensor) -> None:
        given["x"] = given["x"].clone()
        given["x"][:, column] = NEIGHBOURS[neighbour](given["x"][:, column]).to(dtype)

    case, plan = case_and_plan(case, tier, True)
    kernels.force(**plan)
    t = {**make(case, dtype, True), "x": operands(case, dtype, True)["x"]}
    for options in ({}, NOISE):
        others, spoilt = _alone_and_beside(case, t, spoil, options)
        assert _is_plain(others).any()
        assert not _is_plain(spoilt).all()


@pytest.mark.parametrize("lmbda", [float("nan"), 0.0, 0.1, 2.1])
@each_dtype
@pytest.mark.parametrize(("case", "tier"), [b for b in BESIDE if b[0].startswith("batch")])
def test_a_frozen_column_does_not_depend_on_its_neighbours(kernels, case, tier, dtype, lmbda):
    def spoil(given: dict, column: Tensor) -> None:
        mean, var, lmbdas = given["running"]
        given["running"] = (mean, var, torch.where(column, lmbda, lmbdas))

    case, plan = case_and_plan(case, tier, True)
    kernels.force(**plan)
    t, groups = make(case, dtype, True), case.groups
    kept = compute_dtype(dtype)
    running = (torch.zeros(groups), torch.full((groups,), 2.0), torch.linspace(0.5, 1.5, groups))
    running = tuple(r.to(kept) for r in running)
    scale = torch.full((groups,), 0.4, dtype=kept)
    for options in ({}, {**NOISE, "noise_scale": scale}):
        _alone_and_beside(case, t, spoil, {"running": running, **options})


# --- sanitizers --------------------------------------------------------------------------------


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path):
    """This file again in another process, with the kernels of two types under ASan and UBSan."""
    libraries = [
        torch_library.run(["g++", f"-print-file-name={name}"]).strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = dict(
        os.environ,
        LD_PRELOAD=" ".join(libraries),
        ASAN_OPTIONS="detect_leaks=0:detect_stack_use_after_return=0",
        UBSAN_OPTIONS="print_stacktrace=1:halt_on_error=1",
        NORMNORM_HOST_CUDA_SANITIZED="1",
    )
    # Not those that run the same kernels over other values, or without a barrier.
    left_out = ("neighbours", "order", "barrier", "bitwise", "resident", "float64", "torch.float16")
    chosen = ["-m", "not slow", "-k", " and ".join(f"not {name}" for name in left_out)]
    pytest_ = ["-m", "pytest", "-q", "-x", "-s", "-p", "no:cacheprovider", *chosen, __file__]
    command = [sys.executable, *pytest_]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=torch_library.ROOT
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
