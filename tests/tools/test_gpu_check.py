"""``benchmarks/gpu_check.py``: its dry run from start to end, what becomes of a run in which a
kernel hangs or the time is over, and what it measures."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import gpu_bench
import gpu_check
import gpu_summary
import gpu_targets
import pytest
import torch
from gpu import build, first_contact
from host_cuda import torch_library

from speed import results

ROOT = Path(__file__).resolve().parents[2]


def gpu_check_run(*arguments, **variables):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    return subprocess.run(
        [sys.executable, "benchmarks/gpu_check.py", *arguments], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables},
        capture_output=True,
    )  # fmt: skip


# --- from start to end -------------------------------------------------------------------------


def test_the_dry_run_does_what_a_run_on_a_gpu_does(tmp_path):
    reason = torch_library.missing()
    if reason is not None:
        pytest.skip(reason)
    torch_library.build()  # what compiling takes here is not to be the check's
    folder, cache = tmp_path / "results", tmp_path / "triton"
    done = gpu_check_run(
        "--dry", "--minutes", "30", "--results", str(folder), TRITON_CACHE_DIR=str(cache)
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((folder / "gpu_check.json").read_text())
    states = {step["step"]: step["status"] for step in record["steps"]}
    assert states.pop("sanitizers") == "not run"  # they watch GPUs alone
    assert set(states.values()) == {"passed"}, done.stdout
    assert {f"{path.name} (not triton)" for path in gpu_check.GPU.glob("test_*.py")} < set(states)
    assert record["failed"] == []
    assert record["tests"]["passed"] > 250
    contact = next(step["paths"] for step in record["steps"] if "paths" in step)
    assert set(contact.values()) == {None}
    assert {"one block", "cluster", "cooperative grid", "streaming"} <= set(contact)
    tests = json.loads((folder / "gpu_check_tests.json").read_text())
    assert len(tests) == sum(record["tests"].values())
    if "Triton's kernels compiled" in states:
        assert list(cache.rglob("*.cubin")), "no kernel was compiled ahead of the Triton tests"

    # The results are few files that can be read.
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert len(files) <= 8
    assert max(files.values()) < 16 << 20
    loaded = results.load(folder / "gpu_check_cuda.json")
    assert loaded.complete
    assert loaded.problems == []
    assert {row.suite for row in loaded.measurements} == {
        "resnet", "tokens", "features", "small", "largest",
    }  # fmt: skip
    assert {row.provider for row in results.load(folder / "gpu_check_networks.json").networks} == {
        "torch", "normnorm-cuda",
    }  # fmt: skip
    page = (folder / "gpu_check.md").read_text()
    assert "dry run: nothing failed; not run: sanitizers" in page
    assert "| cooperative grid | right |" in page


# --- when things go wrong ----------------------------------------------------------------------


def test_without_a_gpu_nothing_begins_and_what_is_stored_stays(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "gpu_check.json").write_text("of another machine")
    done = gpu_check_run("--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("gpu check: no GPU: torch ")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of another machine"]


@pytest.fixture
def check(tmp_path):
    """A run of ten minutes whose results go into ``results``."""
    (tmp_path / "scratch").mkdir()
    made = gpu_check.Check(tmp_path / "scratch", True, time.monotonic() + 600)
    (made.folder / gpu_check.LOG).touch()
    made.keep_in(tmp_path / "results")
    return made


def written(tmp_path, text):
    """A file of tests beside the hook of ``tests/cuda/gpu``."""
    (tmp_path / "conftest.py").write_text("from gpu.conftest import *\n")
    file = tmp_path / "test_mine.py"
    file.write_text("import os, signal, time, pytest\n" + textwrap.dedent(text))
    return file


def outcomes(check):
    return {name.rpartition("::")[2]: test["outcome"] for name, test in check.tests.items()}


def test_a_hang_a_crash_and_a_failure_are_named_and_the_others_run(check, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "SILENT_S", 2.0)
    file = written(
        tmp_path,
        """
        def test_a(): pass
        def test_b():
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 60))  # as deaf as a waiting driver
            time.sleep(600)
        def test_c(): assert 1 == 2, "both lines of\\na traceback"
        def test_d(): os.kill(os.getpid(), signal.SIGSEGV)
        def test_e(): pytest.skip("no reason")
        """,
    )
    gpu_check.run_file(check, file, "not triton", 60.0)
    assert outcomes(check) == {
        "test_a": "passed", "test_b": "failed", "test_c": "failed", "test_d": "failed",
        "test_e": "skipped",
    }  # fmt: skip
    assert check.record["failed"] == ["test_mine.py (not triton)"]
    tests = json.loads((check.folder / "gpu_check_tests.json").read_text())
    failures = {test["test"].rpartition("::")[2]: test["said"] for test in tests}
    assert "nothing had happened for 8 s" in failures["test_b"]
    assert 'def test_c(): assert 1 == 2, "both lines of' in failures["test_c"]
    assert "in the middle of it: exit status -11" in failures["test_d"]


def test_what_the_deadline_leaves_out_is_not_run_and_no_failure(check, tmp_path):
    begun = tmp_path / "begun"
    file = written(
        tmp_path,
        f"""
        def test_a(): pass
        def test_b(): open({str(begun)!r}, "w"); time.sleep(600)
        def test_c(): pass
        """,
    )

    def set_deadline():
        while not begun.exists() and check.left_s > 0:
            time.sleep(0.05)
        check.deadline = 0.0

    threading.Thread(target=set_deadline).start()
    gpu_check.run_file(check, file, "not triton", 60.0)
    assert outcomes(check) == {"test_a": "passed", "test_b": "not run", "test_c": "not run"}
    check.step("more", [sys.executable, "-c", "raise SystemExit(1)"], 60)
    gpu_check.bench(check, "cuda", 60)
    assert {step["status"] for step in check.record["steps"]} == {"not run"}
    assert check.record["failed"] == []


def test_a_step_that_hangs_is_killed_with_its_children(check, tmp_path):
    program = f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        open({str(tmp_path / "child")!r}, "w").write(str(child.pid))
        print("so far", flush=True); time.sleep(600)
    """
    check.step("hangs", [sys.executable, "-c", textwrap.dedent(program)], 2)
    assert check.record["failed"] == ["hangs"]
    assert "had not ended within 8 s" in check.record["steps"][0]["message"]
    assert "so far" in (check.folder / gpu_check.LOG).read_text()
    stat = Path(f"/proc/{(tmp_path / 'child').read_text()}/stat")
    until = time.monotonic() + 10
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until, "a child of the step lives on"
        time.sleep(0.05)


def test_a_path_that_hangs_at_first_contact_is_left_out_of_what_follows(
    check, tmp_path, monkeypatch
):
    """The program of first contact with its check replaced: one path hangs, one is wrong."""
    program = f"""
        import sys
        sys.path[:0] = [{str(ROOT / "tests/cuda")!r}, {str(ROOT / "tests")!r}, {str(ROOT)!r}]
        from gpu import first_contact, rig
        def check(rig_, name):
            if name == "cluster": raise rig.Hang("the device has not ended its work")
            return "float32: off" if name == "streaming" else None
        first_contact.check = check
        first_contact.Rig.find = lambda: rig.Rig(first_contact.torch.device("cpu"))
        sys.exit(first_contact.main(sys.argv[1:]))
    """
    (tmp_path / "first_contact.py").write_text(textwrap.dedent(program))
    monkeypatch.setattr(gpu_check, "GPU", tmp_path)
    assert gpu_check.first_contact(check) == ["cluster"]
    (step,) = check.record["steps"]
    assert step["status"] == "failed"
    found = step["paths"]
    assert set(found) == set(first_contact.PATHS)
    assert {path for path, error in found.items() if error} == {"cluster", "streaming"}
    assert found["cluster"].startswith("hangs: ")


@pytest.mark.parametrize(
    ("said", "code", "status"),
    [
        ("========= ERROR SUMMARY: 0 errors", 0, "passed"),
        ("========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", 0, "passed"),
        ("========= RACECHECK SUMMARY: 2 hazards displayed (1 error, 1 warning)", 86, "failed"),
        ("========= Invalid __global__ write\n========= ERROR SUMMARY: 3 errors", 86, "failed"),
        ("========= Error: Device not supported.", 1, "not run"),
        ("========= COMPUTE-SANITIZER", None, "not run"),
    ],
)
def test_a_sanitizer_fails_where_it_found_something(said, code, status):
    ended = gpu_check.Ended(code, None if code is not None else "late", 1.0, said)
    assert gpu_check.sanitizers_verdict(ended)[0] == status


def test_each_tool_watches_the_program(check, tmp_path, monkeypatch):
    """With a stand-in for compute-sanitizer that runs what it is given, and finds a race."""
    said = f"#!{sys.executable}\nimport sys, subprocess\n"
    tool = """
    name = sys.argv[sys.argv.index("--tool") + 1]
    code = subprocess.run(sys.argv[sys.argv.index("20") + 1:]).returncode
    print(f"========= ERROR SUMMARY: {int(name == 'racecheck')} errors")
    sys.exit(code or 86 * (name == "racecheck"))
    """
    program = "sys.exit(len(sys.argv) > 1)"
    for path, text in (("compute-sanitizer", tool), ("build/gpu/sanitized", program)):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(said + textwrap.dedent(text))
        file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    check.dry = False
    gpu_check.sanitizers(check)
    states = {step["step"]: step["status"] for step in check.record["steps"]}
    assert states.pop("sanitizers: racecheck") == "failed"
    assert set(states.values()) == {"passed"}
    assert len(states) == len(gpu_check.TOOLS)


# --- what is measured -------------------------------------------------------------------------


def test_the_works_are_those_that_the_targets_speak_of():
    rows = [
        {
            "suite": work.suite, "layer": work.layer, "dtype": work.dtype,
            "shape": list(work.shape), "memory_format": work.memory_format, "mode": work.mode,
            "operation": operation, "method": work.method, "provider": provider, "status": "ok",
            "median_ms": 0.5, "ratio": 0.9, "model_bytes": work.model_bytes(operation),
            "kept_bytes": 100 if operation == "full" else None,
        }
        for part in ("cuda", "triton")
        for work, providers in gpu_bench.works(part)
        for operation in work.operations
        for provider in providers
        if part == "cuda" or provider.startswith("normnorm") or work.suite == "definition"
    ]  # fmt: skip
    network = {"network": "resnet50", "provider": "normnorm-cuda", "ratio": 1.02, "status": "ok"}
    judged = gpu_targets.judge(rows, [network], ["normnorm-cuda"])
    assert len(judged) == len(gpu_targets.TARGETS) + 1
    for each in judged:
        assert each["rows"] == each["of"], each
    missed = {each["target"].partition(": ")[2] for each in judged if not each["met"]}
    assert {name.partition(" /")[0] for name in missed} == {
        "BatchNormalNorm1d training, (N, C) fp32", "both in training",
    }  # fmt: skip
    one = [row for row in rows if row["suite"] == "tokens" and row["operation"] == "full"][:1]
    alone = gpu_targets.judge(one, [], ["normnorm-cuda"])
    assert {each["remark"] for each in alone if each["met"] is None} == {"not measured"}
    assert [each["remark"] for each in alone if each["met"]] == ["from 1 of 5 rows"]


def test_predictions_follow_the_device():
    """(256, 64, 56, 56) in bfloat16, forward with noise: on an H200 bound by issue, as counted by
    hand; on an H100 by memory, when instructions are few."""
    row = {
        "operation": "forward", "mode": "noise", "dtype": "bfloat16",
        "model_bytes": 4 * 256 * 64 * 56 * 56,
    }  # fmt: skip
    gpu = {"name": "NVIDIA H200", "multiprocessors": 132, "max_clock_mhz": 1980.0}
    count = {"operation": "forward", "mode": "noise", "dtype": "bfloat16", "instructions": 44.0}
    assert gpu_summary.predicted_ms(row, gpu, [count]) == pytest.approx(0.0901, abs=1e-4)
    gpu["name"] = "NVIDIA H100 80GB HBM3"
    assert gpu_summary.predicted_ms(row, gpu, []) == pytest.approx(0.0852, abs=1e-4)
    assert gpu_summary.predicted_ms(row, {**gpu, "name": "another"}, []) is None


# --- what tests/cuda/gpu is made of --------------------------------------------------------------


def test_a_build_is_used_where_sources_and_architecture_are_the_same(tmp_path, monkeypatch):
    built: list[str] = []

    def make(arch):
        built.append(arch)
        for name in build.MADE:
            (tmp_path / name).touch()
        return {**build.made_of(arch), "nvcc": "release 13.0"}

    monkeypatch.setattr(build, "FOLDER", tmp_path)
    monkeypatch.setattr(build, "build", make)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setattr(build, "HERE", tmp_path)
    kernel = tmp_path / "csrc/kernel.cu"
    kernel.parent.mkdir()
    for arch, source in (("9.0", "a"), ("9.0", "a"), ("8.0", "a"), ("8.0", "b")):
        kernel.write_text(source)
        monkeypatch.setattr(sys, "argv", ["build.py", "--arch", arch])
        build.main()
    assert built == ["9.0", "8.0", "8.0"]


def test_what_is_asked_of_torch_cuda_exists():
    """Names, and the keywords that are passed, in code that only a GPU reaches."""
    found: dict[str, set[str]] = {}
    for file in [*(ROOT / "benchmarks").glob("gpu_*.py"), *(ROOT / "tests/cuda/gpu").glob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else node
            if isinstance(called, ast.Attribute):
                name = ast.unparse(called)
                if re.fullmatch(r"torch\.(cuda|profiler)(\.\w+)+", name):
                    keywords = {k.arg for k in node.keywords} if isinstance(node, ast.Call) else ()
                    found.setdefault(name, set()).update(keywords)
    assert {"torch.cuda.CUDAGraph", "torch.cuda.graph", "torch.cuda.Event"} <= set(found)
    for name, keywords in found.items():
        value = torch
        for part in name.split(".")[1:]:
            value = getattr(value, part)  # raises where there is no such name
        if keywords:
            assert keywords <= set(inspect.signature(value).parameters), name
