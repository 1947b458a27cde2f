"""The compiled Triton kernels: registers, memory accesses, instruction counts. No GPU."""

from __future__ import annotations

import collections
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cuda_static import sass
from oracle import Case
from triton_tools.interpreter import missing

ROOT = Path(__file__).resolve().parents[2]
BUDGETS = ROOT / "tests/data/triton_budgets.json"


def absent() -> str | None:
    if missing() is not None:
        return missing()
    tools = [t for t in ("cuobjdump", "nvdisasm") if not sass.tool(t)]
    return f"not found: {', '.join(tools)}" if tools else None


pytestmark = pytest.mark.skipif(absent() is not None, reason=str(absent()))

# Every kernel and layout: short and long rows, runs of a channel, columns, weights within groups.
WORKS = {
    "layer rows of 64": (Case("layer", (640, 64), normalized_ndim=1), False),
    "layer rows of 768": (Case("layer", (512, 768), normalized_ndim=1), False),
    "layer rows of 4096": (Case("layer", (64, 4096), normalized_ndim=1), False),
    "layer rows of 8192": (Case("layer", (64, 8192), normalized_ndim=1), False),
    "layer rows of 65536": (Case("layer", (8, 65536), normalized_ndim=1), False),
    "batch 56x56": (Case("batch", (64, 64, 56, 56)), False),
    "batch 14x14": (Case("batch", (64, 256, 14, 14)), False),
    "batch 7x7": (Case("batch", (64, 256, 7, 7)), False),
    "batch 56x56 channels_last": (Case("batch", (64, 64, 56, 56)), True),
    "batch (128, 1024)": (Case("batch", (128, 1024)), False),
    "batch (65536, 64)": (Case("batch", (65536, 64)), False),
    "group 32x32": (Case("group", (16, 128, 32, 32), num_groups=32), False),
    "group 32x32 channels_last": (Case("group", (16, 128, 32, 32), num_groups=8), True),
    "instance 28x28": (Case("instance", (16, 64, 28, 28)), False),
}
DEFAULT = ("layer rows of 768", "batch 56x56", "batch 56x56 channels_last", "group 32x32")
COMBINATIONS = [
    pytest.param(
        target, work, dtype, id=f"{target}-{work}-{str(dtype)[6:]}",
        marks=()
        if target in ("sm_90", "gfx942") and dtype == torch.bfloat16
        and work in (DEFAULT if target == "sm_90" else DEFAULT[:1])
        else pytest.mark.slow,
    )
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for work in WORKS
    for dtype in (torch.bfloat16, torch.float32)
]  # fmt: skip


def launches(
    target: str, work: str, dtype: torch.dtype, alpha: float = 1.0, noise: float = 0.4,
    fused: str = "",
):  # fmt: skip
    """All kernels of a training step, compiled; with ReLU and a residual ``fused`` "after" the
    affine map or "before" the statistics."""
    from triton_tools import ahead

    from normnorm.triton_kernels import launch

    case, last = WORKS[work]

    def step() -> None:
        x = torch.empty(case.shape, dtype=dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        weight = torch.empty(case.parameter_shape)
        config = case.config(
            "triton", noise_train=noise, channels_last=last, alpha=alpha,
            activation="relu" if fused else "",
        )  # fmt: skip
        seed = torch.tensor([1])
        none, needs = (None, None, None), (True, True, True)
        w, result = (weight, weight), x if fused else None
        if fused == "before":
            given, kept, grad_sum = (x, seed, None, True, True), result, x
        else:
            given, kept, grad_sum = (result, seed, None, False, True), result, None
        _, stats, _ = launch.normal_norm_forward(x, *none, *w, *given, *config)
        launch.normal_norm_backward(x, x, stats, *w, kept, seed, grad_sum, *needs, False, *config)

    return ahead.compiled(target, step)


def cubin_of(compiled, folder: Path) -> Path:
    path = folder / f"{compiled.name}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    return path


@pytest.mark.parametrize(("target", "work", "dtype"), COMBINATIONS)
def test_no_kernel_spills_and_aligned_ones_move_whole_vectors(target, work, dtype, tmp_path):
    found = launches(target, work, dtype)
    assert len(found) >= 2
    for compiled in found:
        what = f"{compiled.name} of {work}, {compiled.spec}"
        code = check_registers(compiled, target, what, tmp_path)
        if code is not None:
            check_vectors(compiled, code, dtype, what)


def check_registers(
    compiled, target: str, what: str, folder: Path, spilt: int = 0
) -> list[str] | None:
    """The instructions of a kernel that spills at most ``spilt`` registers and has no atomics, so
    that equal inputs give equal bits; None on AMD."""
    if target == "gfx942":
        scratch = re.findall(r"; ScratchSize: (\d+)", compiled.asm["amdgcn"])
        assert scratch, what
        assert set(scratch) == {"0"}, f"{what}: {scratch} bytes of scratch memory"
        assert "v_exp_f32" in compiled.asm["amdgcn"] or compiled.name not in ("forward",), what
        return None
    path = cubin_of(compiled, folder)
    (usage,) = sass.resources(path).values()
    (code,) = sass.instructions(path).values()
    assert usage["STACK"] <= 4 * spilt, f"{what}: a stack frame of {usage['STACK']} bytes"
    assert usage["LOCAL"] == 0, what
    assert sum(bool(re.match(r"STL\b", i)) for i in code) <= spilt, what
    assert spilt or not [i for i in code if re.match(r"LDL\b", i)], what
    assert not [i for i in code if re.match(r"(ATOM|ATOMG|RED)\b", i)], what
    return code


# Kernels that write a tensor of the input's shape, and when.
WRITES = ("forward", "backward", "stream_output")
READS = (*WRITES, "stream_moments", "stream_lambda", "stream_x", "stream_gradient")


def vector(compiled, dtype: torch.dtype) -> tuple[int, int]:
    """(elements of the widest access that the tile allows, elements of a group in a thread)"""
    spec = compiled.spec
    each = spec.R * spec.L // (32 * compiled.kernel.metadata.num_warps)
    widest = 4 if spec.LAYOUT == 2 else 16 // dtype.itemsize
    return min(widest, spec.ALIGN, each), spec.K * each


def check_vectors(compiled, code: list[str], dtype: torch.dtype, what: str) -> None:
    """Loads and stores are as wide as alignment, tile and layout allow."""
    if compiled.name not in READS:
        return
    bits = 8 * vector(compiled, dtype)[0] * dtype.itemsize
    if bits < 64:
        return
    widths = r"64|128" if bits == 64 else "128"
    reads = [i for i in code if re.match(rf"LDG\.E\S*\.({widths})\b", i)]
    assert reads, f"{what}: no load of {bits} bits"
    if compiled.name in WRITES:
        assert any(re.match(rf"STG\.E\S*\.({widths})\b", i) for i in code), what
    narrow = [i for i in code if re.match(r"(LDG|STG)\.E\S*\.(U8|U16|S16)\b", i)]
    assert not narrow, f"{what}: {narrow[:3]}"


# Tensors that a kernel reads and writes beyond those of a plain pass: one after the affine map
# and for the mask; the residual (twice where there is a pilot), the sum, and the sum's gradient.
FUSED = {
    "after": {
        "forward": [(1, 0)], "backward": [(1, 0)],
        "stream_output": [(1, 0)], "stream_gradient": [(1, 0), (1, 0)],
    },
    "before": {
        "forward": [(1, 1)], "backward": [(2, 0)],
        "stream_moments": [(2, 1)], "stream_gradient": [(1, 0), (2, 0)],
    },
}  # fmt: skip
DEFAULT_FUSED = {
    "layer rows of 768": ("before",),
    "batch (128, 1024)": ("after",),
    "batch 56x56": ("after", "before"),
}
ELSEWHERE = ("layer rows of 768", "batch 14x14", "batch 56x56")
FUSED_COMBINATIONS = [
    pytest.param(
        target, work, dtype, fused, id=f"{target}-{work}-{str(dtype)[6:]}-{fused}",
        marks=()
        if target == "sm_90" and dtype == torch.bfloat16 and fused in DEFAULT_FUSED.get(work, ())
        else pytest.mark.slow,
    )
    for target in ("sm_80", "sm_90", "sm_100", "gfx942")
    for work in WORKS
    for dtype in (torch.bfloat16, torch.float32)
    for fused in FUSED
    # Seconds each: all of one architecture, and one work a layout of the others.
    if target == "sm_90" or (work in ELSEWHERE and dtype == torch.bfloat16)
]  # fmt: skip


def room(compiled) -> int:
    """Registers that a kernel may spill. With sixteen warps a thread has 128, and a thread that
    holds more than 24 elements of several runs uses them all without a residual, whose address
    takes two more: spilled once, that costs less than a further pass over memory."""
    full = compiled.name == "forward" and compiled.spec.LAYOUT == 1
    full = full and compiled.kernel.metadata.num_warps == 16
    return 2 if full and compiled.spec.K * compiled.spec.R * compiled.spec.L > 24 * 32 * 16 else 0


@pytest.mark.parametrize(("target", "work", "dtype", "fused"), FUSED_COMBINATIONS)
def test_fused_operands_cost_whole_vectors_and_no_spill(target, work, dtype, fused, tmp_path):
    plain, with_fused = (launches(target, work, dtype, fused=f) for f in ("", fused))
    assert [c.name for c in plain] == [c.name for c in with_fused]
    assert [c.spec for c in plain] == [c.spec and replace(c.spec, RELU=False) for c in with_fused]
    met: dict[str, int] = collections.Counter()
    for before, compiled in zip(plain, with_fused, strict=True):
        what = f"{compiled.name} of {work}, {fused}, {compiled.spec}"
        code = check_registers(compiled, target, what, tmp_path, room(compiled))
        if code is None:
            continue
        check_vectors(compiled, code, dtype, what)
        expected = FUSED[fused].get(compiled.name)
        if expected is None:
            continue
        reads, writes = expected[met[compiled.name]]
        met[compiled.name] += 1
        (without,) = sass.instructions(cubin_of(before, tmp_path)).values()
        elements, each = vector(compiled, dtype)
        for operation, tensors in (("LDG", reads), ("STG", writes)):
            more = sum(i.startswith(operation) for i in code)
            more -= sum(i.startswith(operation) for i in without)
            assert more == tensors * each // elements, f"{what}: {more} {operation} more"
    assert met or target == "gfx942"


def every_path() -> None:
    """Given statistics and noise scales, one gradient alone, running statistics, float64, offsets
    beyond 31 bits."""
    from normnorm.triton_kernels import launch, plan

    none, seed = (None, None, None), torch.tensor([1])

    def step(case: Case, dtype: torch.dtype, last: bool = False, **options: float) -> None:
        x = torch.empty(case.shape, dtype=dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        w = torch.empty(case.parameter_shape, dtype=dtype)
        config = case.config("triton", channels_last=last, noise_train=0.4, **options)
        _, s, _ = launch.normal_norm_forward(x, *none, w, w, None, seed, None, False, True, *config)
        needs = (True, True, True, False)
        launch.normal_norm_backward(x, x, s, w, w, None, seed, None, *needs, *config)

    def fuse(case: Case, dtype: torch.dtype) -> None:
        x, w = torch.empty(case.shape, dtype=dtype), torch.empty(case.parameter_shape, dtype=dtype)
        config = case.config("triton", activation="relu")
        plain = (None, None, None)
        y, s, total = launch.normal_norm_forward(
            x, *plain, w, w, x, None, None, True, True, *config
        )  # fmt: skip
        needs = (True, True, True)
        launch.normal_norm_backward(x, total, s, w, w, y, None, x, *needs, False, *config)
        if case.kind == "batch":
            running = [torch.empty(case.shape[1]) for _ in range(3)]
            y, s, _ = launch.normal_norm_forward(
                x, *running, w, w, x, None, None, False, True, *config
            )  # fmt: skip
            launch.normal_norm_backward(x, x, s, w, w, y, None, None, *needs, True, *config)

    for dtype, last in ((torch.bfloat16, False), (torch.float64, True)):
        case = Case("batch", (16, 8, 8, 8))
        x = torch.empty(case.shape, dtype=dtype)
        if last:
            x = x.to(memory_format=torch.channels_last)
        w, running = torch.empty(8, dtype=dtype), [torch.empty(8) for _ in range(3)]
        config = case.config("triton", channels_last=last)
        quiet = (None, None, None, False)
        _, s, _ = launch.normal_norm_forward(x, *running, w, w, *quiet, True, *config)
        needs = (True, True, True, True)
        launch.normal_norm_backward(x, x, s, w, w, None, None, None, *needs, *config)
        launch.normal_norm_forward(x, *none, w, None, *quiet, False, *config)
        config = case.config("triton", channels_last=last, noise_train=0.3, order=1, stream=1)
        scale = torch.empty(8, dtype=s.dtype)
        launch.normal_norm_forward(x, *none, w, w, None, seed, scale, False, True, *config)
        needs = (False, True, False, False)
        launch.normal_norm_backward(x, x, s, w, w, None, seed, None, *needs, *config)
        for momentum in (0.1, None):
            for buffers in (running, [b.bfloat16() for b in running]):
                tracked = torch.tensor(1)
                launch.fold_running_(s, *buffers, tracked, momentum, 100, 1e-5)
    step(Case("layer", (8, 333), normalized_ndim=1), torch.float64)
    step(Case("layer", (2, 70000), normalized_ndim=1), torch.float64)
    fuse(Case("batch", (16, 8, 8, 8)), torch.bfloat16)
    narrow = plan._is_wide
    plan._is_wide = lambda *_: True
    try:
        step(Case("batch", (64, 8, 30, 30)), torch.float32)
        step(Case("batch", (64, 6, 30, 30)), torch.float32, True)
        fuse(Case("group", (2, 6, 30, 30), num_groups=2), torch.float16)
    finally:
        plan._is_wide = narrow


@pytest.mark.parametrize("target", ["sm_90", pytest.param("gfx942", marks=pytest.mark.slow)])
def test_every_other_path_compiles_too(target):
    from triton_tools import ahead

    names = {compiled.name for compiled in ahead.compiled(target, every_path)}
    assert {"forward", "backward", "stream_output", "stream_gradient"} <= names
    assert {"parameter_sums", "reduce_parameters", "fold_running"} <= names


# --- budgets -------------------------------------------------------------------------------------

PROBES = ("forward", "forward with noise", "backward", "backward with noise")
FEW, MANY, PROBED_WARPS = 2, 4, 4


def per_element(target: str, folder: Path) -> dict[str, dict[str, float]]:
    """Instructions an element of the resident kernels: the difference that two more tiles make.
    With alpha 0, so that the series path, which few groups take, is not compiled."""
    from normnorm.triton_kernels import plan

    plan_of = plan.row_tiles
    counts: dict[str, list[collections.Counter]] = collections.defaultdict(list)
    for tiles in (FEW, MANY):
        WORKS["probe"] = (Case("layer", (64, 1024 * tiles), normalized_ndim=1), False)
        plan.row_tiles = lambda *_, K=tiles, **__: plan.Tiles(1, 1024, K, PROBED_WARPS)
        try:
            for noise, suffix in ((0.0, ""), (0.4, " with noise")):
                for compiled in launches(target, "probe", torch.bfloat16, 0.0, noise):
                    if compiled.name in ("forward", "backward"):
                        (code,) = sass.instructions(cubin_of(compiled, folder)).values()
                        heads = collections.Counter(i.split(".")[0].split()[0] for i in code)
                        heads["all"] = len(code)
                        counts[compiled.name + suffix].append(heads)
        finally:
            plan.row_tiles = plan_of
            del WORKS["probe"]
    elements = (MANY - FEW) * 1024 / (32 * PROBED_WARPS)
    return {
        name: {
            "instructions": (many["all"] - few["all"]) / elements,
            "special": (many["MUFU"] - few["MUFU"]) / elements,
        }
        for name, (few, many) in counts.items()
    }


def triton_version() -> str:
    import triton

    return triton.__version__


@pytest.mark.parametrize(
    "target", ["sm_90", *(pytest.param(t, marks=pytest.mark.slow) for t in ("sm_80", "sm_100"))]
)
def test_instruction_budgets(target, tmp_path):
    """Within 5 % of the stored counts, either way. ``python tests/triton/test_triton_static.py
    --update`` stores new ones."""
    stored = json.loads(BUDGETS.read_text()).get(triton_version())
    if stored is None:
        pytest.skip(f"no budgets are stored for Triton {triton_version()}")
    measured = per_element(target, tmp_path)
    assert measured.keys() == stored[target].keys() == set(PROBES)
    for name, counts in measured.items():
        for what, count in counts.items():
            budget = stored[target][name][what]
            assert abs(count - budget) <= 0.05 * budget, f"{name}: {count} {what}, budget {budget}"


def test_normals_take_special_functions_and_no_stack(tmp_path):
    """One sine and one cosine instruction a pair of normals; Triton's functions reduce angles."""
    for compiled in launches("sm_90", "layer rows of 768", torch.bfloat16):
        if compiled.name != "forward":
            continue
        (code,) = sass.instructions(cubin_of(compiled, tmp_path)).values()
        elements = compiled.spec.K * compiled.spec.L // (32 * compiled.kernel.metadata.num_warps)
        for function in ("SIN", "COS"):
            count = sum(i.startswith(f"MUFU.{function}") for i in code)
            assert count == elements // 2
        wide = sum(i.startswith("IMAD.WIDE.U32") for i in code)
        # a 64-bit multiplication a product, two a round; those of the first rounds have constants
        assert wide >= 18 * elements // 4


def main() -> None:
    import tempfile

    folder = Path(tempfile.mkdtemp())
    measured = {t: per_element(t, folder) for t in ("sm_80", "sm_90", "sm_100")}
    print(json.dumps(measured, indent=1))
    if "--update" in sys.argv:
        stored = json.loads(BUDGETS.read_text()) if BUDGETS.exists() else {}
        stored[triton_version()] = measured
        BUDGETS.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
