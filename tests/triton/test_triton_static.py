"""The compiled Triton kernels: registers, memory accesses, instruction counts. No GPU."""

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
from raw_ops import backward_pass, both_passes, forward_pass
from shards import sharded_passes
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
DTYPES = (torch.bfloat16, torch.float32)
FUSED = {"after": ("residual", "relu"), "before": ("sum", "relu")}
# Those of `make test`; and the works whose fused kernels are compiled for every architecture.
DEFAULT = ("layer rows of 768", "batch 56x56", "batch 56x56 channels_last", "group 32x32")
EVERYWHERE = ("layer rows of 768", "batch 14x14", "batch 56x56")


def fused_of(target: str, work: str, dtype: torch.dtype) -> tuple[str, ...]:
    """What is fused in the kernels that are compiled beside the plain ones, seconds each. Those
    with a sum hold most."""
    half = dtype == torch.bfloat16
    if target != "sm_90":
        return tuple(FUSED) if half and work in EVERYWHERE else ()
    return tuple(FUSED) if half else ("before",)


# Every work for every architecture, in one type: bfloat16 on sm_90, in turn on the others. Those of
# `make test` in both on sm_90.
COMBINATIONS = [
    pytest.param(
        target, work, dtype, id=f"{target}-{work}-{str(dtype)[6:]}",
        marks=() if dtype == torch.bfloat16 and (
            (target == "sm_90" and work in DEFAULT) or (target, work) == ("gfx942", DEFAULT[0])
        ) else pytest.mark.slow,
    )
    for place, target in enumerate(("gfx942", "sm_80", "sm_90", "sm_100"))
    for number, work in enumerate(WORKS)
    for dtype in (
        DTYPES[(place + number) % 2 :][:1] if target != "sm_90"
        else DTYPES[: 1 + (work in DEFAULT)]
    )
]  # fmt: skip


def empty_operands(case: Case, dtype: torch.dtype, last: bool = False, kept=torch.float32):
    """Operands that no kernel reads."""
    t = {name: torch.empty(case.shape, dtype=dtype) for name in ("x", "residual", "g", "grad_sum")}
    if last:
        t = {name: each.to(memory_format=torch.channels_last) for name, each in t.items()}
    parameter = torch.empty(case.parameter_shape, dtype=kept)
    return {**t, "weight": parameter, "bias": parameter}


def launches(target: str, work: str, dtype: torch.dtype, fused: str = "", **options: float):
    """All kernels of a training step, compiled."""
    from triton_tools import ahead

    case, last = WORKS[work]
    given = (case, empty_operands(case, dtype, last), FUSED.get(fused, ()), last)
    options = {"noise_train": 0.4, **options}
    return ahead.compiled(target, lambda: both_passes("triton", *given, **options))


def cubin_of(compiled, folder: Path) -> Path:
    path = folder / f"{compiled.name}.cubin"
    path.write_bytes(compiled.asm["cubin"])
    return path


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
ACCESSES = {
    "after": {
        "forward": [(1, 0)], "backward": [(1, 0)],
        "stream_output": [(1, 0)], "stream_gradient": [(1, 0), (1, 0)],
    },
    "before": {
        "forward": [(1, 1)], "backward": [(2, 0)],
        "stream_moments": [(2, 1)], "stream_gradient": [(1, 0), (2, 0)],
    },
}  # fmt: skip


def room(compiled) -> int:
    """Registers that a kernel may spill. With sixteen warps a thread has 128, and a thread that
    holds more than 24 elements of several runs uses them all without a residual, whose address
    takes two more: spilled once, that costs less than a further pass over memory."""
    full = compiled.name == "forward" and compiled.spec.LAYOUT == 1
    full = full and compiled.kernel.metadata.num_warps == 16
    return 2 if full and compiled.spec.K * compiled.spec.R * compiled.spec.L > 24 * 32 * 16 else 0


@pytest.mark.parametrize(("target", "work", "dtype"), COMBINATIONS)
def test_no_kernel_spills_and_aligned_ones_move_whole_vectors(target, work, dtype, tmp_path):
    """Fused operands cost whole vectors of their own, and nothing else in memory."""
    plain = launches(target, work, dtype)
    assert len(plain) >= 2
    codes = [check(compiled, target, f"{work}, plain", dtype, tmp_path) for compiled in plain]
    for fused in fused_of(target, work, dtype):
        found = launches(target, work, dtype, fused)
        assert [c.name for c in plain] == [c.name for c in found]
        assert [c.spec for c in plain] == [c.spec and replace(c.spec, ACTIVATION=0) for c in found]
        left = {name: list(accesses) for name, accesses in ACCESSES[fused].items()}
        for compiled, without in zip(found, codes, strict=True):
            what = f"{compiled.name} of {work}, {fused}, {compiled.spec}"
            code = check(compiled, target, what, dtype, tmp_path, room(compiled))
            if code is None or compiled.name not in left:
                continue
            elements, each = vector(compiled, dtype)
            for operation, tensors in zip(("LDG", "STG"), left[compiled.name].pop(0), strict=True):
                more = sum(i.startswith(operation) for i in code)
                more -= sum(i.startswith(operation) for i in without)
                assert more == tensors * each // elements, f"{what}: {more} {operation} more"


def check(
    compiled, target: str, what: str, dtype: torch.dtype, folder: Path, spilt: int = 0
) -> list[str] | None:
    code = check_registers(compiled, target, what, folder, spilt)
    if code is not None:
        check_vectors(compiled, code, dtype, what)
    return code


@pytest.mark.parametrize(
    "work", ["batch 56x56", pytest.param("batch 56x56 channels_last", marks=pytest.mark.slow)]
)
def test_rounds_over_a_shard_spill_nothing_either(work, tmp_path):
    from triton_tools import ahead

    (case, last), dtype = WORKS[work], torch.bfloat16
    t = empty_operands(case, dtype, last)
    given = (case, t, case.shape[:1], FUSED["after"], last)
    found = ahead.compiled("sm_90", lambda: sharded_passes("triton", *given, noise_train=0.4))
    names = {compiled.name for compiled in found}
    assert names == {*READS[2:], "reduce_moments", "reduce_sums"}
    for compiled in found:
        check(compiled, "sm_90", f"{compiled.name} of {work} over a shard", dtype, tmp_path)


def every_path() -> None:
    """Given statistics and noise scales, one gradient alone, running statistics, float64, rows of
    one element, one channel, offsets beyond 31 bits."""
    from normnorm.triton_kernels import launch, plan

    noise, case = {"noise_train": 0.4}, Case("batch", (16, 8, 8, 8))
    for dtype, last in ((torch.bfloat16, False), (torch.float64, True)):
        t, running = empty_operands(case, dtype, last, dtype), [torch.empty(8) for _ in range(3)]
        both_passes("triton", case, t, (), last, running=running)
        forward_pass("triton", case, {"x": t["x"], "weight": t["weight"]}, (), last)
        saved = forward_pass("triton", case, t, (), last, **noise, order=1, stream=1)
        scale = saved[1][0].clone()
        forward_pass("triton", case, t, (), last, noise_scale=scale, **noise, order=1, stream=1)
        backward_pass("triton", case, t, saved, (), last, needs=(False, True, False), **noise)
        for momentum in (0.1, None):
            for buffers in (running, [b.bfloat16() for b in running]):
                launch.fold_running_(saved[1], *buffers, torch.tensor(1), momentum, 100, 1e-5)
    fused = empty_operands(case, torch.bfloat16, False, torch.bfloat16)
    both_passes("triton", case, fused, FUSED["before"])
    both_passes("triton", case, fused, FUSED["after"], running=running)
    for length in (1, 333, 70000):
        rows = Case("layer", (8, length), normalized_ndim=1)
        double = empty_operands(rows, torch.float64, False, torch.float64)
        both_passes("triton", rows, double, **noise)
    narrow, plan._is_wide = plan._is_wide, lambda *_: True
    try:
        for channels, last in ((8, False), (6, True), (1, True)):
            case = Case("batch", (64, channels, 30, 30))
            t = empty_operands(case, torch.float32, last)
            both_passes("triton", case, t, (), last, **noise)
        case = Case("group", (2, 6, 30, 30), num_groups=2)
        half = empty_operands(case, torch.float16, False, torch.float16)
        both_passes("triton", case, half, FUSED["before"])
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
                step = {"alpha": 0.0, "noise_train": noise}
                for compiled in launches(target, "probe", torch.bfloat16, **step):
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
        # Two 64-bit products a round; some in the first two rounds have constants. A half that is
        # used alone is IMAD.HI, a product that all threads share is UIMAD.
        products = ("IMAD.WIDE.U32", "IMAD.HI.U32", "UIMAD.WIDE.U32")
        assert sum(i.startswith(products) for i in code) >= 12 * elements // 8


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
