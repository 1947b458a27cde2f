"""The compiled CPU kernels: instruction sets, large groups, threads, arguments."""

import contextlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import raw_ops
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import CASES, Case, check, draw, draw_parameters, noise_words, normals_of
from test_core_math import runnable

import normnorm
from normnorm import backends
from normnorm.backends import cpu

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(
    cpu.unavailable_reason() is not None, reason=str(cpu.unavailable_reason())
)
CPU = backends.get("cpu") if cpu.unavailable_reason() is None else None


# --- the library ---------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm here")
def test_the_library_links_neither_the_unstable_abi_nor_python():
    command = ["nm", "-D", "--undefined-only", str(cpu.LIBRARY)]
    listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


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
    Case("batch", (3, 5, 13, 13)), Case("batch", (2, 3, 50, 50)), Case("batch", (301, 19)),
    Case("layer", (5, 333), normalized_ndim=1), Case("layer", (2, 5003), normalized_ndim=1),
    Case("group", (2, 6, 9, 9), num_groups=2), Case("group", (7, 12), num_groups=3),
    Case("instance", (2, 3, 47, 47)),
)  # fmt: skip


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
    Case("batch", (3, 2, 310, 310)), Case("batch", (700, 2, 20, 20)), Case("batch", (30000, 10)),
    Case("layer", (2, 270_001), normalized_ndim=1), Case("layer", (400, 100), normalized_ndim=1),
    Case("instance", (1, 2, 520, 510)), Case("group", (1, 4, 260, 260), num_groups=2),
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_large_groups_agree_with_the_definition_for_any_number_of_threads(case, dtype, set_threads):
    """Within bounds on one thread, and bitwise the same on more."""
    for last in (False, True)[: 2 if len(case.shape) == 4 else 1]:
        t = raw_ops.operands(case, dtype, last, law="exponential", parameter_dtype=dtype)
        set_threads(1)
        alone = raw_ops.check("cpu", case, t, last=last, noise_train=0.4)
        for threads in (2, 7):
            set_threads(threads)
            found = raw_ops.both_passes("cpu", case, t, last=last, noise_train=0.4)
            torch.testing.assert_close(found, alone, rtol=0, atol=0)
            if case.kind == "batch":
                running = raw_ops.running_statistics(t)
                raw_ops.check("cpu", case, t, last=last, running=running)


# --- raw ops given anything ----------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.bool]


@st.composite
def tensors(draw_value, optional=True):
    if optional and draw_value(st.booleans()):
        return None
    shape = draw_value(st.lists(st.integers(0, 4), min_size=0, max_size=5))
    dtype = draw_value(st.sampled_from(DTYPES if draw_value(st.booleans()) else DTYPES[:1]))
    tensor = torch.ones(shape, dtype=dtype)
    if tensor.dim() > 1 and draw_value(st.booleans()):
        tensor = tensor.transpose(0, -1)
    return tensor[..., ::2] if tensor.dim() and draw_value(st.booleans()) else tensor


configurations = (
    st.sampled_from(["batch", "layer", "group", "instance", "other"]), st.integers(-1, 3),
    st.integers(-1, 3), st.sampled_from([1e-5, 0.0, -1.0, float("nan"), float("inf")]),
    st.sampled_from([0.0, 0.4, -1.0, float("nan")]), st.sampled_from([1.0, 0.0, float("inf")]),
    st.integers(0, 3), st.sampled_from([0.0, 0.003, -1.0]), st.integers(-1, 2**40), st.booleans(),
    st.sampled_from(["", "relu"]),
)  # fmt: skip
some, any_or_none, flag = tensors(optional=False), tensors(), st.booleans()
ANYTHING = {
    "forward": (some, *[any_or_none] * 8, flag, flag, *configurations),
    "backward": (*[some] * 3, *[any_or_none] * 5, *[flag] * 4, *configurations),
    "fold": (
        *[some] * 4, any_or_none, st.sampled_from([None, 0.1, float("nan")]), st.integers(-1, 5),
        st.sampled_from([1e-5, 0.0, -1.0]),
    ),
}  # fmt: skip


@pytest.mark.parametrize("op", ANYTHING)
def test_an_op_given_anything_refuses_or_computes(op):
    """An op may refuse, but must neither crash nor change what it then refuses."""

    @settings(max_examples=400)
    @given(st.tuples(*ANYTHING[op]))
    def call(arguments):
        copies = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
        with contextlib.suppress(ValueError, RuntimeError, TypeError, NotImplementedError):
            getattr(CPU, op)(*arguments)
            return
        for before, after in zip(copies, arguments, strict=True):
            if isinstance(after, torch.Tensor):
                assert torch.equal(before, after)

    call()


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
    case, seed = Case("layer", (rows, columns), normalized_ndim=1), torch.tensor([9])
    y, stats, _ = raw_ops.forward_pass("cpu", case, {"x": x, "seed": seed}, noise_train=0.4)
    for first in (0, 1024, 65536):  # equal rows of input, all beyond each other in noise
        torch.testing.assert_close(stats[:, first], stats[:, 0])
    assert not torch.equal(y[65536], y[0])
    start = 65536 * columns // 8  # counters of row 65536, whose elements lie beyond 2^31
    z = normals_of(noise_words(columns // 8, 9, first=start)).reshape(-1)
    quiet = raw_ops.forward_pass("cpu", case, {"x": x[65536:65537]})[0]
    scale = 0.4 * stats[4, 65536].item()
    got = (y[65536].double() - quiet[0].double()) / scale
    assert np.abs(got.numpy() - z).max() < 0.1
