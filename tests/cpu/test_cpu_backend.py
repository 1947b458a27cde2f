"""The compiled CPU kernels: instruction sets, large groups, threads, memory bounds, arguments."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CASES, UNIT, Case, check, draw, draw_parameters
from test_core_math import runnable

import normnorm
from normnorm import backends
from normnorm.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
OPS = torch.ops.normnorm_cpu
NONE = (None, None, None)


def configuration(kind="batch", num_groups=0, normalized_ndim=0, **options):
    case = Case(kind, (), num_groups, normalized_ndim)
    return case.config("cpu", **options)[:-1]


# --- the library ---------------------------------------------------------------------------------

@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_library_links_neither_the_unstable_abi_nor_python():
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", str(cpu.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    names = {line.split()[-1].partition("@")[0] for line in listed.splitlines()}
    assert not {name for name in names if name.startswith(("_ZN2at", "_ZN3c10", "Py", "GOMP"))}


def test_loading_the_library_leaves_denormals_alone():
    assert np.float32(1e-40) * np.float32(1) != 0
    assert (torch.tensor([1e-40]) * 1).item() != 0


def test_info_says_what_runs():
    info = cpu.info()
    assert info["isa"] in runnable()
    assert "fast-math" not in str(info["build"])
    assert info["threads"] == torch.get_num_threads()


def run_python(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    folders = (ROOT, *(ROOT / name for name in ("tests", "tests/core", "tests/cpu")))
    path = os.pathsep.join([*map(str, folders), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
    )


def test_an_unknown_instruction_set_is_refused_with_those_there_are():
    program = """
import torch, normnorm
try:
    normnorm.BatchNormalNorm1d(3)(torch.randn(4, 3))
except ValueError as error:
    print(error)
"""
    said = run_python(program, NORMNORM_CPU_ISA="mmx").stdout
    assert "'mmx'" in said
    assert all(isa in said for isa in runnable())


# --- accuracy on every instruction set -----------------------------------------------------------

# Groups of several blocks, and groups that do not fill whole vectors.
SHAPES = (
    Case("batch", (3, 5, 13, 13)),
    Case("batch", (2, 3, 50, 50)),
    Case("batch", (301, 19)),
    Case("layer", (5, 333), normalized_ndim=1),
    Case("layer", (2, 5003), normalized_ndim=1),
    Case("group", (2, 6, 9, 9), num_groups=2),
    Case("group", (7, 12), num_groups=3),
    Case("instance", (2, 3, 47, 47)),
)


def check_everything() -> str:
    """Checks forward and backward passes of all cases; returns the instruction set that ran."""
    with normnorm.use_backend("cpu"):
        for number, case in enumerate((*CASES, *SHAPES)):
            for dtype in (torch.float32, torch.bfloat16, torch.float64):
                for law in ("normal", "exponential"):
                    x = draw(case, law, number, dtype)
                    options = {"seed": number, "noise_train": 0.4, "what": law}
                    parameters = draw_parameters(case, number, dtype)
                    check(case, x, *parameters, **options)
                    if case.kind != "layer" and x.dim() == 4:
                        x = x.to(memory_format=torch.channels_last)
                        check(case, x, *parameters, channels_last=True, **options)
    return str(cpu.info()["isa"])


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_results_are_within_bounds_on_every_instruction_set(isa):
    if isa not in runnable():
        pytest.skip(f"this processor has no {isa}: its kernels were not tested")
    program = "import test_cpu_backend as t; print(t.check_everything())"
    done = run_python(program, NORMNORM_CPU_ISA=isa)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split()[-1] == isa


# --- large groups, threads -----------------------------------------------------------------------

# Few groups larger than the scratch memory, many groups, short runs.
LARGE = (
    Case("batch", (3, 2, 310, 310)),
    Case("batch", (700, 2, 20, 20)),
    Case("batch", (30000, 10)),
    Case("layer", (2, 270_001), normalized_ndim=1),
    Case("layer", (400, 100), normalized_ndim=1),
    Case("instance", (1, 2, 520, 510)),
    Case("group", (1, 4, 260, 260), num_groups=2),
)


def forward_and_backward(case, x, g, weight, bias, backend="cpu"):
    last = x.dim() > 2 and not x.is_contiguous()
    config = case.config("cpu", noise_train=0.4, channels_last=last)[:-1]
    serves, seed = backends.get(backend), torch.tensor([77])
    y, stats, _ = serves.forward(
        x, *NONE, weight, bias, None, seed, None, False, True, *config
    )  # fmt: skip
    return (y, stats, *serves.backward(
        g, x, stats, weight, bias, None, seed, None, True, True, True, False, *config
    ))  # fmt: skip


@pytest.fixture
def set_threads():
    """torch.set_num_threads, undone after the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_groups_agree_with_the_definition_for_any_number_of_threads(case, dtype, set_threads):
    """Within bounds on one thread, and bitwise the same on more."""
    formats = (torch.contiguous_format, torch.channels_last)
    for memory_format in formats[: 2 if len(case.shape) == 4 else 1]:
        x = torch.randn(case.shape).exp().to(dtype).contiguous(memory_format=memory_format)
        tensors = (x, torch.randn(case.shape).to(dtype), *draw_parameters(case, 1, dtype))
        results = []
        for threads in (1, 2, 7):
            set_threads(threads)
            results.append(forward_and_backward(case, *tensors))
        doubles = (tensor.double() for tensor in tensors)
        want = forward_and_backward(case, *doubles, backend="reference")
        names = ("y", "stats", "du", "dw", "db")
        for name, exact, got, *others in zip(names, want, *results, strict=True):
            scale = exact.abs().max().item()
            error = (got.double() - exact).abs().max().item() / scale
            storage = UNIT[dtype] if name != "stats" else 0.0
            assert error < 4e-5 + 4 * storage, f"{name} off by {error:.2g} of {scale:.2g}"
            assert all(torch.equal(other, got) for other in others), name


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_outside_the_given_views_is_touched_or_read(case, dtype):
    """Every tensor is between NaNs, which a read would carry into the result and a write change."""
    guard, made = 67, []

    def guarded(values: torch.Tensor) -> torch.Tensor:
        whole = torch.full((values.numel() + 2 * guard,), float("nan"), dtype=values.dtype)
        inside = whole[guard:-guard].view(values.shape)
        inside.copy_(values)
        made.append(whole)
        return inside

    x, g = guarded(draw(case, "normal", 0, dtype)), guarded(draw(case, "normal", 1, dtype))
    weight, bias = (guarded(p) for p in draw_parameters(case, 0, dtype))
    config = case.config("cpu", noise_train=0.4)[:-1]
    seed = torch.tensor([5])
    y, stats, _ = OPS.normal_norm_forward(
        x, *NONE, weight, bias, None, seed, None, False, True, *config
    )  # fmt: skip
    stats = guarded(stats)
    gradients = OPS.normal_norm_backward(
        g, x, stats, weight, bias, None, seed, None, True, True, True, False, *config
    )
    for result in (y, *gradients):
        assert torch.isfinite(result).all()
    for whole in made:
        assert whole[:guard].isnan().all()
        assert whole[-guard:].isnan().all()


# --- raw ops given anything ----------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]
shapes = st.lists(st.integers(0, 4), min_size=0, max_size=5)


@st.composite
def tensors(draw_value, optional=True):
    if optional and draw_value(st.booleans()):
        return None
    shape = draw_value(shapes)
    dtype = draw_value(st.sampled_from(DTYPES if draw_value(st.booleans()) else DTYPES[:1]))
    tensor = torch.ones(shape, dtype=dtype)
    if tensor.dim() > 1 and draw_value(st.booleans()):
        tensor = tensor.transpose(0, -1)
    return tensor[..., ::2] if tensor.dim() and draw_value(st.booleans()) else tensor


configurations = st.tuples(
    st.sampled_from(["batch", "layer", "group", "instance", "other"]),
    st.integers(-1, 3),
    st.integers(-1, 3),
    st.sampled_from([1e-5, 0.0, -1.0, float("nan"), float("inf")]),
    st.sampled_from([0.0, 0.4, -1.0, float("nan")]),
    st.sampled_from([1.0, 0.0, float("inf")]),
    st.integers(0, 3),
    st.sampled_from([0.0, 0.003, -1.0]),
    st.integers(-1, 2**40),
    st.booleans(),
    st.sampled_from(["", "relu"]),
)
REFUSALS = (ValueError, RuntimeError, TypeError, NotImplementedError)


def harmless(op, *arguments) -> None:
    """Calls an op that may refuse, but must neither crash nor change what it then refuses."""
    copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    with contextlib.suppress(*REFUSALS):
        op(*arguments)
        return
    for before, after in zip(copies, arguments, strict=True):
        if isinstance(after, torch.Tensor):
            assert torch.equal(before, after)


@settings(max_examples=400)
@given(
    tensors(optional=False),
    st.tuples(*[tensors()] * 8),
    st.tuples(*[st.booleans()] * 2),
    configurations,
)
def test_forward_given_anything_refuses_or_computes(x, rest, flags, config):
    harmless(OPS.normal_norm_forward, x, *rest, *flags, *config)


@settings(max_examples=400)
@given(
    st.tuples(*[tensors(optional=False)] * 3),
    st.tuples(*[tensors()] * 5),
    st.tuples(*[st.booleans()] * 4),
    configurations,
)
def test_backward_given_anything_refuses_or_computes(needed, optional, flags, config):
    harmless(OPS.normal_norm_backward, *needed, *optional, *flags, *config)


@settings(max_examples=300)
@given(
    st.tuples(*[tensors(optional=False)] * 4),
    tensors(),
    st.sampled_from([None, 0.1, float("nan")]),
    st.integers(-1, 5),
    st.sampled_from([1e-5, 0.0, -1.0]),
)
def test_fold_given_anything_refuses_or_computes(needed, tracked, momentum, count, eps):
    harmless(OPS.fold_running_, *needed, tracked, momentum, count, eps)


# --- beyond 32-bit indices -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.serial
def test_more_than_2_to_the_31_elements():
    """(2^16 + 3) x 2^15 + ... in bfloat16: 4.3 GB in, as much out; needs 12 GiB of memory."""
    rows, columns = 2**16 + 3, 2**15
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < 12 * 2**30:
        pytest.skip(f"needs 12 GiB of free memory, {available / 2**30:.1f} are")
    x = torch.empty(rows, columns, dtype=torch.bfloat16)
    piece = torch.randn(1024, columns, dtype=torch.bfloat16)
    for first in range(0, rows, 1024):
        x[first : first + 1024] = piece[: min(1024, rows - first)]
    config = configuration("layer", normalized_ndim=1, noise_train=0.4)
    seed = torch.tensor([9])
    y, stats, _ = OPS.normal_norm_forward(
        x, *NONE, None, None, None, seed, None, False, True, *config
    )  # fmt: skip
    for first in (0, 1024, 65536):  # equal rows of input, all beyond each other in noise
        torch.testing.assert_close(stats[:, first], stats[:, 0])
    assert not torch.equal(y[65536], y[0])
    from normnorm.noise import philox_words, uniforms

    start = 65536 * columns // 4  # counters of row 65536, whose elements lie beyond 2^31
    words = philox_words(torch.arange(start, start + columns // 4), seed, 0)
    radius = torch.sqrt(-2.0 * torch.log(uniforms(words[0])))
    z = radius * torch.cos(2.0 * torch.pi * uniforms(words[1]))
    quiet = OPS.normal_norm_forward(
        x[65536:65537], *(None,) * 8, False, True,
        *configuration("layer", normalized_ndim=1),
    )[0]  # fmt: skip
    scale = 0.4 * stats[4, 65536].item()
    got = (y[65536].double() - quiet[0].double())[::4] / scale
    assert (got - z).abs().max() < 0.1
