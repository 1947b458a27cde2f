"""Registers, memory accesses and instruction counts of the CUDA kernels' machine code."""

import json
import re

import pytest
from cuda_static import sass

pytestmark = pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing()))

# Every type for the architecture that CI builds the extension for, and one type for each of the
# others, whose compilation takes 80 seconds. Not float64: the C library's sine takes a stack frame.
BUILDS = [
    ("bfloat16", "sm_90"),
    pytest.param("float32", "sm_90", marks=pytest.mark.slow),
    pytest.param("float16", "sm_90", marks=pytest.mark.slow),
    pytest.param("float32", "sm_80", marks=pytest.mark.slow),
    pytest.param("bfloat16", "sm_100", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("storage", "architecture"), BUILDS)
def test_no_kernel_spills(storage, architecture):
    cubin = sass.compile_cubin(sass.ROOT / f"csrc/cuda/{storage}.cu", architecture)
    usage = sass.resources(cubin)
    assert len(usage) > 20
    for name, used in usage.items():
        assert used["STACK"] == 0, f"{name}: a stack frame of {used['STACK']} bytes"
        assert used["LOCAL"] == 0, name
    for name, code in sass.instructions(cubin).items():
        local = [i for i in code if re.match(r"(LDL|STL)\b", i)]
        assert not local, f"{name}: {local[:3]}"


def moves_chunks(name: str) -> bool:
    """Whether a kernel reads tensors in whole chunks: its second template argument is kRagged."""
    found = re.match(r"(rows|stream|column|run)_\w+<[\w ]+, (\w+)", name)
    return bool(found) and found[2] == "false" and "finish" not in name


@pytest.mark.parametrize(("storage", "architecture"), BUILDS)
def test_aligned_kernels_move_128_bits(storage, architecture):
    """Tensors in 128-bit accesses; only parameters and statistics are read number by number."""
    cubin = sass.compile_cubin(sass.ROOT / f"csrc/cuda/{storage}.cu", architecture)
    kernels = {n: c for n, c in sass.instructions(cubin).items() if moves_chunks(n)}
    assert len(kernels) >= 15
    for name, code in kernels.items():
        assert any(re.match(r"LDG(STS)?\.E\S*\.128", i) for i in code), name
        writes = r"rows_|\w+_output|\w+_gradient<[\w ]+, false, false"
        writes += r"|\w+_moments<[\w ]+, false, true"
        if re.match(writes, name):  # a fused first round writes the sum
            assert any(re.match(r"STG\.E\S*\.128", i) for i in code), name
        narrow = [i for i in code if re.match(r"STG\.E\S*\.(U8|U16|64)\b", i)]
        # two double totals of the moments, written for the thread group's other blocks
        totals = 2 if re.match(r"rows_forward<.*GridThreads", name) else 0
        wide = [i for i in narrow if ".64" in i]
        assert len(narrow) == len(wide) <= totals, f"{name}: {narrow[:3]}"


@pytest.mark.parametrize(
    "architecture",
    [pytest.param(a, marks=() if a == "sm_90" else pytest.mark.slow) for a in sass.ARCHITECTURES],
)
def test_instruction_budgets(architecture):
    """Within 5 % of the stored counts, up or down, so that a saving is stored."""
    stored = json.loads(sass.BUDGETS.read_text()).get(sass.nvcc_version())
    if stored is None:
        pytest.skip(f"no budgets are stored for nvcc {sass.nvcc_version()}")
    measured = sass.per_element(sass.compile_cubin(sass.PROBES, architecture))
    assert measured.keys() == stored[architecture].keys()
    for name, counts in measured.items():
        for what, count in counts.items():
            budget = stored[architecture][name][what]
            assert abs(count - budget) <= 0.05 * budget, f"{name}: {count} {what}, budget {budget}"


@pytest.mark.parametrize("architecture", ["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def test_cluster_kernels_use_the_hardware_barrier(architecture):
    cubin = sass.compile_cubin(sass.ROOT / "csrc/cuda/bfloat16.cu", architecture)
    kernels = {n: c for n, c in sass.instructions(cubin).items() if "ClusterThreads" in n}
    assert kernels
    for name, code in kernels.items():
        assert any(i.startswith("UCGABAR") for i in code), name
