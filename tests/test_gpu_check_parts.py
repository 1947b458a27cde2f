"""What only a GPU reaches of ``benchmarks/gpucheck``, against stand-ins for ``torch.cuda``
and for programs of the CUDA toolkit; every name of ``torch.cuda`` that they use is looked up."""

from __future__ import annotations

import ast
import ctypes
import inspect
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from host_cuda import torch_library

ROOT = Path(__file__).resolve().parent.parent
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from gpu import forced  # noqa: E402
from gpucheck import (  # noqa: E402
    benchmark,
    build,
    environment,
    rig,
    sanitizers,
    schema,
    smoke,
    stage,
    targets,
    works,
)


@pytest.fixture(autouse=True)
def _importable_elsewhere(monkeypatch):
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), str(ROOT), before]))


def fake_program(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{textwrap.dedent(text)}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def fake_path(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


@pytest.fixture
def section(tmp_path) -> stage.Section:
    return stage.Section(tmp_path / "section.json", time.time() + 600, dry=False)


@pytest.mark.parametrize(
    ("said", "code", "status", "findings"),
    [
        ("========= ERROR SUMMARY: 0 errors\n{done}", 0, "passed", 0),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n{done}", 0,
         "passed", 0),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors\n{done}", 86,
         "failed", 3),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)\n{done}", 86,
         "failed", 2),
        ("========= ERROR SUMMARY: 0 errors\n", 1, "failed", 0),
        ("========= Error: Device not supported. Please refer to the manual\n", 1, "unavailable",
         None),
        ("Segmentation fault", -11, "failed", None),
        ("========= COMPUTE-SANITIZER\n", None, "unavailable", None),
    ],
)  # fmt: skip
def test_what_a_sanitizer_says_is_understood(said, code, status, findings):
    from gpucheck.sanitized import FINISHED

    found = sanitizers.judge(code, said.format(done=FINISHED))
    assert found[:2] == (status, findings)
    assert found[2]


def test_the_sanitizers_watch_the_program(section, fake_path, monkeypatch):
    """With a stand-in for the tool that runs what it is given, and finds a race."""
    fake_program(
        fake_path,
        "compute-sanitizer",
        """
        import subprocess, sys
        if "--version" in sys.argv: print("Version 0"); sys.exit()
        tool = sys.argv[sys.argv.index("--tool") + 1]
        assert sys.argv[sys.argv.index("--kernel-name") + 1] == "kns=normnorm"
        program = sys.argv[sys.argv.index("application-only") + 1:]
        sys.exit(subprocess.run(program).returncode or
                 print(f"========= ERROR SUMMARY: {int(tool == 'racecheck')} errors"))
        """,
    )
    monkeypatch.setattr(sanitizers.Rig, "find", lambda dry: None)
    said = f"print({sanitizers.FINISHED!r})"
    monkeypatch.setattr(sanitizers, "program", lambda dry: [sys.executable, "-c", said])
    with pytest.raises(stage.Failure, match="racecheck"):
        sanitizers.run(section)
    tools = section.data["tools"]
    assert {name: tool["status"] for name, tool in tools.items()} == {
        "memcheck": "passed", "racecheck": "failed", "synccheck": "passed", "initcheck": "passed",
    }  # fmt: skip
    assert list(schema.problems(section.data, schema.DATA["sanitizers"])) == []


def test_a_missing_sanitizer_is_unavailable_and_never_green(section, monkeypatch):
    monkeypatch.setattr(sanitizers, "find_sanitizer", lambda: None)
    monkeypatch.setattr(sanitizers.Rig, "find", lambda dry: None)
    program = [sys.executable, "-c", f"print({sanitizers.FINISHED!r})"]
    monkeypatch.setattr(sanitizers, "program", lambda dry: program)
    sanitizers.run(section)
    assert section.status == "unavailable"
    assert "not installed" in section.message
    assert {tool["status"] for tool in section.data["tools"].values()} == {"unavailable"}


def test_a_program_that_fails_unwatched_is_not_watched(section, monkeypatch):
    monkeypatch.setattr(sanitizers.Rig, "find", lambda dry: None)
    monkeypatch.setattr(sanitizers, "program", lambda dry: [sys.executable, "-c", "raise OSError"])
    with pytest.raises(stage.Failure, match="fails by itself: OSError"):
        sanitizers.run(section)


def a_gpu(monkeypatch, **functions) -> None:
    """Stand-ins for functions of torch.cuda, each with the signature of the real one."""
    for name, stand_in in functions.items():
        real = inspect.signature(getattr(torch.cuda, name))

        def call(*arguments, _real=real, _stand_in=stand_in, **keywords):
            _real.bind(*arguments, **keywords)
            return _stand_in(*arguments, **keywords)

        monkeypatch.setattr(torch.cuda, name, call)


def test_the_rig_finds_the_current_gpu(monkeypatch):
    a_gpu(monkeypatch, is_available=lambda: True, current_device=lambda: 1)
    found = rig.Rig.find(False)
    assert found.device == torch.device("cuda", 1)
    assert not found.dry
    assert found.pick("gpu", "dry") == "gpu"


class FakeStream:
    """Notes what is asked of it."""

    said: list[str]

    def __init__(self, device=None) -> None:
        self.device = device

    def wait_stream(self, other) -> None:
        self.said.append("wait")


@contextmanager
def noted(said: list[str], name: str):
    said.append(f"{name} begins")
    yield
    said.append(f"{name} ends")


def test_a_step_is_warmed_up_beside_captured_once_and_replayed(monkeypatch):
    said: list[str] = []
    FakeStream.said = said
    current = FakeStream()
    graph = SimpleNamespace(replay=lambda: said.append("replay"))
    a_gpu(
        monkeypatch,
        current_stream=lambda device: current,
        Stream=FakeStream,
        stream=lambda stream: noted(said, "side" if stream is not current else "current"),
        CUDAGraph=lambda: graph,
        graph=lambda cuda_graph: noted(said, "capture"),
    )
    results = [torch.zeros(1)]

    def step():
        said.append("step")
        return results

    real = rig.Rig(False, torch.device("cuda", 0))
    replay = real.capture(step)
    assert said == [
        "wait", "side begins", "step", "step", "side ends", "wait", "capture begins", "step",
        "capture ends",
    ]  # fmt: skip
    said.clear()
    assert replay() is results
    assert said == ["replay"]
    said.clear()
    with real.stream():
        said.append("work")
    assert said == ["wait", "side begins", "work", "side ends"]


def test_work_of_the_device_is_told_from_the_hosts():
    """Categories of events as torch's profiler names them in a trace."""
    trace = {
        "traceEvents": [
            {"ph": "X", "cat": "cpu_op", "name": "aten::random_"},
            {"ph": "X", "cat": "cpu_op", "name": "normnorm_cuda::normal_norm_forward"},
            {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernelExC"},
            {"ph": "X", "cat": "kernel", "name": "rows_forward"},
            {"ph": "X", "cat": "gpu_memset", "name": "Memset (Device)"},
            {"ph": "X", "cat": "gpu_user_annotation", "name": "step"},
            {"ph": "M", "name": "process_name"},
        ]
    }
    assert rig.work_in(trace, dry=False) == ["rows_forward", "Memset (Device)"]
    assert rig.work_in(trace, dry=True) == ["aten::random_", "normnorm_cuda::normal_norm_forward"]


def test_the_build_is_for_the_found_architecture_and_requires_the_kernels(section, monkeypatch):
    a_gpu(monkeypatch, get_device_capability=lambda device: (9, 0))
    real = rig.Rig(False, torch.device("cuda", 0))
    monkeypatch.setattr(build.Rig, "find", lambda dry: real)
    seen = {}

    def run(command, **keywords):
        seen.setdefault("command", command)
        seen.setdefault("env", keywords.get("env"))
        return SimpleNamespace(returncode=0, stdout="normnorm: built\n", stderr="")

    monkeypatch.setattr(build.subprocess, "run", run)
    monkeypatch.setattr(build, "_usage", lambda library: None)
    linked = []
    monkeypatch.setattr(build, "_link_launchers", linked.append)
    build.run(section)
    assert seen["command"][1:] == ["setup.py", "build_ext", "--inplace"]
    assert seen["env"]["TORCH_CUDA_ARCH_LIST"] == "9.0"
    assert seen["env"]["NORMNORM_CUDA"] == seen["env"]["NORMNORM_NATIVE"] == "1"
    assert section.data["said"] == ["normnorm: built"]
    assert linked == [real]
    assert list(schema.problems(section.data, schema.DATA["build"])) == []


def test_a_failed_build_says_what_it_said(section, monkeypatch):
    """Such as where nvcc is missing: the build's own sentence is the stage's."""
    a_gpu(monkeypatch, get_device_capability=lambda device: (9, 0))
    real = rig.Rig(False, torch.device("cuda", 0))
    monkeypatch.setattr(build.Rig, "find", lambda dry: real)
    program = (
        "print('normnorm: the CUDA kernels were required: no nvcc was found'); raise SystemExit(1)"
    )
    monkeypatch.setattr(build, "build_command", lambda: [sys.executable, "-c", program])
    with pytest.raises(stage.Failure, match=r"exit status 1: normnorm: .* no nvcc was found"):
        build.run(section)
    assert section.data["architecture"] == "9.0"


@pytest.mark.skipif(not shutil.which("g++"), reason="needs g++")
def test_a_forced_problem_arrives_as_it_was_meant(tmp_path):
    """Every field of the launchers' problem through ``forced.cpp``, against stand-ins for them."""
    stub = forced.SOURCE.with_name("forced_stub.cpp")
    library = tmp_path / "forced.so"
    subprocess.run(
        ["g++", "-std=c++20", "-shared", "-fPIC", "-fvisibility=hidden",
         str(forced.SOURCE), str(stub), "-o", str(library)], check=True,
    )  # fmt: skip
    loaded = ctypes.CDLL(str(library))
    numbers = iter(range(1001, 1100))

    def operand():
        return next(numbers), (next(numbers), next(numbers), next(numbers))

    names = ("input", "output", "grad_output")
    names += ("residual", "activated", "addend", "sum", "grad_sum")
    problem = {
        "storage": 2, "geometry": [1, 3, 4, 5, 6], "affine": 3, "noise": True,
        "given_scale": True, "seed": 7, "noise_train": 0.25, "stream": 9,
        "position": (10, 11, 12), "eps": 1e-3, "alpha": 0.5, "transform_eps": 0.125, "order": 1,
        "frozen": True, "stats": 13, "workspace": 14, "rung": 3, "threads": 64, "blocks": 15,
        "teams": 16, "relu": True, **{name: operand() for name in names},
        "weight": (17, True), "bias": (18, False), "grad_weight": (19, False),
        "grad_bias": (20, True),
    }  # fmt: skip
    arrays = forced.arrays(problem)
    types = (ctypes.c_int64, ctypes.c_double, ctypes.c_void_p)
    size = ctypes.c_size_t()
    made = [(t * len(a))(*a) for t, a in zip(types, arrays, strict=True)]
    assert loaded.forced_workspace(*made, 1, ctypes.byref(size)) == 0
    seen = list((ctypes.c_double * size.value).in_dll(loaded, "seen"))
    operands = [n for name in names for n in (problem[name][0], *problem[name][1])]
    assert seen == [
        1, 2, 1, 3, 4, 5, 6, 3, 1, 1, 9, 0.25, 10, 11, 12, 1, 1, 1e-3, 0.5, 0.125,
        17, 1, 18, 0, 19, 0, 20, 1, *operands, 1, 3, 64, 15, 16, 7, 13, 14,
    ]  # fmt: skip
    assert loaded.forced_run(*made, 0, None) == size.value
    assert ctypes.c_double.in_dll(loaded, "seen").value == 0


def test_missing_objects_are_said_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(forced, "ROOT", tmp_path)
    with pytest.raises(stage.Failure, match="build/ holds no compiled CUDA kernels"):
        forced.build(tmp_path)


def test_cuobjdumps_report_is_read():
    text = """
    Fatbin elf code:
    Resource usage:
     Common:
      GLOBAL:0
     Function _ZN8normnorm4rowsE:
      REG:128 STACK:0 SHARED:1024 LOCAL:0 CONSTANT[0]:700 TEXTURE:0 SURFACE:0 SAMPLER:0
     Function _ZN8normnorm4foldE:
      REG:40 STACK:16 SHARED:0 LOCAL:0 CONSTANT[0]:640 TEXTURE:0 SURFACE:0 SAMPLER:0
    """
    assert build.read_usage(text) == {
        "count": 2, "largest_registers": 128, "spilling": ["_ZN8normnorm4foldE"],
    }  # fmt: skip
    assert build.read_usage("nothing") is None


def test_nvidia_smi_is_asked_for_what_is_kept(fake_path):
    fake_program(
        fake_path,
        "nvidia-smi",
        """
        import sys
        query = next(a for a in sys.argv if a.startswith("--query-gpu="))
        print(", ".join(f"<{name}>" for name in query.partition("=")[2].split(",")))
        """,
    )
    found = environment.nvidia_smi()
    assert found is not None
    assert found["driver_version"] == "<driver_version>"
    assert found["clocks.sm"] == "<clocks.sm>"
    fake_program(fake_path, "nvidia-smi", "raise SystemExit(9)")
    assert environment.nvidia_smi() is None


def test_the_smoke_stage_names_what_it_missed(section, monkeypatch):
    reason = torch_library.missing()
    if reason is not None:
        pytest.skip(reason)
    section.dry = True
    case = smoke.selfcheck.CASES[0]
    monkeypatch.setattr(rig.Rig, "serving", lambda self: ["cuda"])
    monkeypatch.setattr(smoke.selfcheck, "CASES", (case,))
    monkeypatch.setattr(smoke.selfcheck, "worst_errors", lambda *_: {"output": float("nan")})
    with pytest.raises(stage.Failure, match=f"1 of 1 checks missed, first cuda {case.layer}"):
        smoke.run(section)
    section.save()
    left = json.loads((section.folder / "section.json").read_text())
    assert left["data"]["checks"][0]["errors"] == {"output": None}  # JSON has no NaN
    assert left["data"]["checks"][0]["passed"] is False


def test_the_benchmark_records_what_fails_and_what_there_is_no_time_for(section, monkeypatch):
    reason = torch_library.missing()
    if reason is not None:
        pytest.skip(reason)
    section.dry = True
    found = benchmark.Benchmark(rig.Rig.find(True), section)
    item, other = works.first(True)[:2]

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(benchmark.engine, "measure", out_of_memory)
    found.measure(item)
    section.until = time.time()
    found.measure(other)
    found.train(works.networks(True)[0])
    reasons = [each["why"] for each in found.data["left_out"]]
    assert reasons[0] == "OutOfMemoryError: CUDA out of memory"
    assert reasons[1:] == ["no time was left"] * 2
    found.save()
    assert list(schema.problems(section.data, schema.DATA["benchmark"])) == []


def test_the_benchmark_runs_without_msgspec(tmp_path):
    """The engine keeps its own files with it; the machine with the GPU need not have it."""
    program = """
    import sys
    class Missing:
        def find_spec(self, name, path=None, target=None):
            if name == "msgspec": raise ModuleNotFoundError(name)
    sys.meta_path.insert(0, Missing())
    import importlib.util
    real = importlib.util.find_spec
    importlib.util.find_spec = lambda n, *a: None if n == "msgspec" else real(n, *a)
    from gpucheck import benchmark
    print(len(benchmark.works.first(False)), benchmark.results.VERSION)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_works_are_those_that_the_targets_speak_of():
    every = [*works.first(False), *works.last(False), *works.definitions(False)]
    rows = []
    for item in every:
        for operation in item.work.operations:
            for provider in item.providers:
                kept = 100 if operation == "full" else None
                rows.append({
                    "suite": item.work.suite, "layer": item.work.layer, "dtype": item.work.dtype,
                    "shape": list(item.work.shape), "memory_format": item.work.memory_format,
                    "mode": item.work.mode, "operation": operation, "method": item.work.method,
                    "provider": provider, "status": "ok", "median_ms": 0.5, "ratio": 0.9,
                    "share_of_copy": 0.9, "kept_bytes": kept,
                })  # fmt: skip
    works_done = {(r["suite"], str(r["shape"]), r["dtype"], r["memory_format"], r["mode"],
                   r["operation"], r["provider"], r["method"]) for r in rows}  # fmt: skip
    assert len(works_done) == len(rows), "measured twice"
    network = {"network": "resnet50", "provider": "normnorm-cuda", "ratio": 1.02, "message": None}
    judged = targets.judge(rows, [network], ["normnorm-cuda"], exact=True)
    by_name = {each["target"].partition(": ")[2]: each for each in judged}
    assert len(by_name) == len(targets.TARGETS) + 1
    for each in judged:
        assert each["rows"] == each["of"], each
        assert each["value"] is not None
    missed = [name for name, each in by_name.items() if not each["met"]]
    assert {name.partition(" /")[0] for name in missed} == {
        "BatchNormalNorm1d training, (N, C) fp32", "both in training",
    }  # fmt: skip


def test_the_works_name_providers_and_networks_that_exist():
    providers = benchmark.engine.PROVIDERS
    for dry in (False, True):
        every = [*works.first(dry), *works.last(dry), *works.definitions(dry)]
        assert {name for item in every for name in item.providers} <= set(providers)
        assert {network.unit for network in works.networks(dry)} == {"images", "tokens"}
    resnet = works.networks(False)[0]
    assert (resnet.name, resnet.dtype, resnet.memory_format) == (
        "resnet50", "bfloat16", "channels_last",
    )  # fmt: skip


def test_a_target_without_all_its_rows_says_so():
    row = {
        "suite": "tokens", "layer": "LayerNormalNorm", "dtype": "bfloat16", "shape": [1, 2],
        "memory_format": "contiguous", "mode": "noise", "operation": "full", "method": "graph",
        "provider": "normnorm-cuda", "status": "ok", "median_ms": 1.0, "ratio": 1.2,
        "share_of_copy": None, "kept_bytes": None,
    }  # fmt: skip
    judged = targets.judge([row], [], ["normnorm-cuda"], exact=True)
    rows = next(each for each in judged if "rows of 768" in each["target"])
    assert (rows["met"], rows["remark"]) == (False, "from 1 of 5 rows")
    wrong = targets.judge([{**row, "status": "wrong"}], [], ["normnorm-cuda"], exact=True)
    rows = next(each for each in wrong if "rows of 768" in each["target"])
    assert (rows["met"], rows["remark"]) == (False, "1 rows failed or were wrong")
    assert any(each["remark"] == "not measured" and each["met"] is None for each in judged)


def _cuda_names() -> dict[str, set[str]]:
    """Names of torch.cuda that the scripts and GPU tests use, with the keywords they pass."""
    found: dict[str, set[str]] = {}
    files = [*(BENCHMARKS / "gpucheck").glob("*.py"), *(ROOT / "tests/gpu").glob("*.py")]
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else node
            if isinstance(called, ast.Attribute):
                name = ast.unparse(called)
                if re.fullmatch(r"torch\.(cuda|profiler)(\.\w+)+", name):
                    keywords = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else ()
                    found.setdefault(name, set()).update(keywords)
    return found


def test_what_is_asked_of_torch_cuda_exists():
    names = _cuda_names()
    assert {"torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.Stream"} <= set(names)
    for name, keywords in names.items():
        value = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part)  # raises where there is no such name
        if keywords:
            known = inspect.signature(value).parameters
            assert keywords <= set(known), name


def test_the_properties_asked_of_a_device_exist():
    """On a build without CUDA the class is bare: its stub knows."""
    stub = Path(torch.__file__).parent / "_C/__init__.pyi"
    _, _, text = stub.read_text(encoding="utf-8").partition("class _CudaDeviceProperties")
    body = text.partition("\nclass ")[0]
    source = (BENCHMARKS / "gpucheck/environment.py").read_text(encoding="utf-8")
    asked = {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "facts"
    }
    assert "multi_processor_count" in asked
    assert all(f"{name}:" in body for name in asked), asked
