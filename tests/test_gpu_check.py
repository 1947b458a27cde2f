"""``benchmarks/gpu_check.py``: its dry run from start to end, and what becomes of a run in which a
stage fails, a test hangs, or nothing can be written."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
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
    plugin,
    runner,
    schema,
    stage,
    summary,
    tests,
)
from gpucheck.record import Record, Unwritable  # noqa: E402

FILES = {"gpu_check.json", "gpu_check.md", "gpu_check.log", "gpu_check_bench.json"}


def gpu_check(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "benchmarks/gpu_check.py", *arguments]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    changed = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run(command, cwd=ROOT, env=changed, capture_output=True, text=True)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "gpu_check.json").read_text(encoding="utf-8"))


# --- from start to end -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dry(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    reason = torch_library.missing()
    if reason is not None:
        pytest.skip(reason)
    torch_library.build()  # what compiling takes here is not to be that of a stage
    forced.kernels(SimpleNamespace(dry=True))
    folder = tmp_path_factory.mktemp("gpu-check")
    return gpu_check("--dry", "--results", str(folder)), folder


def test_the_dry_run_comes_to_its_end(dry):
    done, folder = dry
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path.name for path in folder.iterdir()} == FILES
    record = record_of(folder)
    assert list(record["stages"]) == [s.name for s in runner.STAGES]
    states = {name: s["status"] for name, s in record["stages"].items()}
    # compute-sanitizer watches GPUs alone: said, never passed over
    assert states.pop("sanitizers") == "unavailable"
    assert set(states.values()) == {"passed"}
    assert record["ok"] is True
    assert record["dry"] is True
    assert "NOT CHECKED, for it is unavailable here: sanitizers" in done.stdout


def test_the_dry_record_has_the_shape_that_is_promised(dry):
    record = record_of(dry[1])
    assert list(schema.problems(record, schema.RECORD)) == []
    for name, found in record["stages"].items():
        assert list(schema.problems(found["data"], schema.DATA[name], name)) == []


def test_the_dry_run_has_run_what_a_gpu_would(dry):
    stages = record_of(dry[1])["stages"]
    ran = stages["tests"]["data"]
    assert ran["counts"]["passed"] > 250
    assert ran["not_run"] == []
    files = {test["test"].split("::")[0] for test in ran["tests"]}
    assert files == {path.name for path in (ROOT / "tests/gpu").glob("test_*.py")}
    assert {check["layer"] for check in stages["smoke"]["data"]["checks"]} >= {
        "BatchNormalNorm2d", "LayerNormalNorm", "GroupNormalNorm", "InstanceNormalNorm1d",
    }  # fmt: skip
    found = stages["benchmark"]["data"]
    assert found["left_out"] == []
    assert {row["suite"] for row in found["rows"]} == {
        "resnet", "tokens", "features", "small", "largest", "definition",
    }  # fmt: skip
    measured = [row for row in found["rows"] if row["provider"] == "normnorm-cuda"]
    assert measured
    assert all(row["status"] == "ok" and row["error"] <= row["bound"] for row in measured)
    assert {row["provider"] for row in found["networks"]} >= {"torch", "normnorm-cuda"}
    ways = {(row["what"], row["way"]) for row in found["joined"] if row["backend"] == "cuda"}
    assert ways >= {
        (what, way)
        for what in ("residual stream", "residual + relu")
        for way in ("joined", "in steps", "torch")
    }
    assert all(target["met"] is None for target in found["targets"]), "tiny inputs prove nothing"


def test_the_summary_names_each_stage(dry):
    done, folder = dry
    page = (folder / "gpu_check.md").read_text(encoding="utf-8")
    for each in runner.STAGES:
        assert f"| {each.name} |" in page
        assert f"\n{each.name} " in done.stdout
    assert "## Targets" in page


def test_the_engines_rows_can_be_read_by_its_own_reader(dry):
    results = pytest.importorskip("normnorm.bench.results")
    loaded = results.load(dry[1] / "gpu_check_bench.json")
    assert loaded.complete
    assert len(loaded.measurements) == len(record_of(dry[1])["stages"]["benchmark"]["data"]["rows"])


# --- when things go wrong ----------------------------------------------------------------------


def test_without_a_gpu_nothing_begins_and_what_is_stored_stays(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    (tmp_path / "gpu_check.json").write_text("of another machine")
    done = gpu_check("--results", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("no GPU: torch ")
    assert "make gpu-check DRY=1" in done.stderr
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of another machine"]


def test_a_python_without_torch_is_said(tmp_path, monkeypatch):
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('No module named torch')")
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    assert runner.why_not_begin() == "ModuleNotFoundError: No module named torch"
    (tmp_path / "torch.py").write_text("import time; time.sleep(600)")
    assert "did not say within 1 s" in str(runner.why_not_begin(1.0))


def test_a_stage_without_a_gpu_says_so(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    record = Record(tmp_path, dry=False)
    runner.run_stages(record, False, [runner.Stage("environment", 60)])
    found = record.stages["environment"]
    assert found["status"] == "failed"
    assert found["message"].startswith("no GPU: torch ")
    assert found["data"]["versions"]["torch"] == torch.__version__
    assert record.finish() is False


def test_an_unwritable_folder_is_said_before_anything_is_done(tmp_path):
    (tmp_path / "file").write_text("")
    done = gpu_check("--dry", "--results", str(tmp_path / "file" / "results"))
    assert done.returncode == 2
    assert "the results cannot be written into" in done.stderr
    assert "RESULTS=" in done.stderr
    assert done.stdout == ""


def test_a_stage_that_does_not_exist_is_refused():
    done = gpu_check("--dry", "--stages", "smoke,nonsense")
    assert done.returncode == 2
    assert "'nonsense' is none of environment, build" in done.stderr


@pytest.fixture
def stages_of_my_own(tmp_path, monkeypatch):
    """Writes programs and runs them as stages: (record, run)."""
    folder = tmp_path / "stages_of_my_own"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    record = Record(tmp_path / "results", dry=True)
    monkeypatch.setattr(runner, "GRACE_S", 0.5)
    monkeypatch.setitem(schema.DATA, "mine", {"found": [int]})
    monkeypatch.setitem(schema.DATA, "after", {"found": [int]})

    def run(ends_s: float = 30.0, **programs: str) -> dict:
        for name, program in programs.items():
            head = "import os, sys, time\nfrom gpucheck import stage\n"
            text = head + textwrap.dedent(program) + "\nstage.main(run)\n"
            (folder / f"{name}.py").write_text(text)
        stages = [runner.Stage(name, ends_s, folder.name) for name in programs]
        runner.run_stages(record, True, stages)
        return record.stages

    return record, run


FINE = """
def run(section):
    section.data = {"found": [1]}
"""


def test_a_stage_that_raises_does_not_stop_the_next(stages_of_my_own):
    _, run = stages_of_my_own
    stages = run(
        mine="""
        def run(section):
            section.data = {"found": [1, 2]}
            raise ZeroDivisionError("by nothing")
        """,
        after=FINE,
    )
    assert stages["mine"]["status"] == "failed"
    assert "ZeroDivisionError" in stages["mine"]["message"]
    assert "by nothing" in stages["mine"]["message"]
    assert stages["mine"]["data"] == {"found": [1, 2]}
    assert stages["after"]["status"] == "passed"


def test_a_stage_that_hangs_is_killed_with_its_children_and_keeps_what_it_had(stages_of_my_own):
    record, run = stages_of_my_own
    began = time.time()
    stages = run(
        ends_s=4.0,
        mine="""
        import subprocess
        def run(section):
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            section.data = {"found": [child.pid]}
            section.save()
            time.sleep(600)
        """,
    )
    assert time.time() - began < 60
    assert stages["mine"]["status"] == "failed"
    assert "killed after" in stages["mine"]["message"]
    (child,) = stages["mine"]["data"]["found"]
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            break
        if Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("a child of the stage lives on")
    assert record_of(record.path.parent)["stages"]["mine"]["data"] == {"found": [child]}


def test_a_stage_that_dies_is_recorded_with_the_signal(stages_of_my_own):
    _, run = stages_of_my_own
    stages = run(
        mine="""
        import signal
        def run(section):
            section.data = {"found": []}
            section.save()
            os.kill(os.getpid(), signal.SIGSEGV)
        """,
        after=FINE,
    )
    assert stages["mine"]["status"] == "failed"
    assert "SIGSEGV" in stages["mine"]["message"]
    assert stages["after"]["status"] == "passed"


def test_data_of_a_wrong_shape_is_a_failure(stages_of_my_own):
    record, run = stages_of_my_own
    stages = run(
        mine="""
        def run(section):
            section.data = {"found": ["one"]}
        """
    )
    assert stages["mine"]["status"] == "failed"
    assert "mine.found[0] is str 'one'" in stages["mine"]["message"]
    assert record.finish() is False


def test_a_record_that_can_no_longer_be_written_goes_on_and_fails(stages_of_my_own, capsys):
    record, run = stages_of_my_own
    run(mine=FINE)
    record.path.unlink()
    record.path.mkdir()
    record.add("mine", {"status": "passed", "message": None, "seconds": 0.1, "data": None})
    assert record.finish() is False
    assert summary.write(record)
    assert "could not be written" in capsys.readouterr().out


def test_an_interrupted_run_closes_its_record(tmp_path):
    command = [sys.executable, "benchmarks/gpu_check.py", "--dry", "--results", str(tmp_path)]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    process = subprocess.Popen(
        [*command, "--stages", "environment,tests"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("== 1/2"):
            break
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    record = record_of(tmp_path)
    assert record["finished"]
    assert record["ok"] is False
    assert "interrupted" in record["stages"]["environment"]["message"]


def test_a_folder_that_becomes_a_file_is_unwritable(tmp_path):
    (tmp_path / "gpu_check.json").mkdir()
    with pytest.raises(Unwritable, match="cannot be written into"):
        Record(tmp_path, dry=True)


# --- tests that hang, crash and break the device -----------------------------------------------


def watched(tmp_path: Path, text: str, limit_s: float = 5.0, seconds: float = 60.0):
    """The watcher over one file of tests."""
    file = tmp_path / "test_watched.py"
    file.write_text("import os, signal, time, pytest\n" + textwrap.dedent(text))
    watcher = tests.Watcher([str(file)], time.time() + seconds, limit_s, lambda: None)
    watcher.run()
    found = {r["test"].rpartition("::")[2]: r for r in watcher.results.values()}
    return watcher, found


@pytest.fixture(autouse=True)
def _plugin_on_path(monkeypatch):
    before = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(BENCHMARKS), str(ROOT), before]))


def test_a_hanging_test_is_killed_and_the_others_run(tmp_path):
    watcher, found = watched(
        tmp_path,
        """
        def test_a(): pass
        def test_b():
            signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 60))  # as deaf as a waiting driver
            time.sleep(600)
        def test_c(): assert 1 == 2
        def test_d(): pytest.skip("no reason")
        """,
    )
    assert {name: r["outcome"] for name, r in found.items()} == {
        "test_a": "passed", "test_b": "failed", "test_c": "failed", "test_d": "skipped",
    }  # fmt: skip
    assert "killed: it had not ended after" in found["test_b"]["message"]
    assert "assert 1 == 2" in found["test_c"]["message"]
    assert found["test_d"]["message"].endswith("no reason")
    assert watcher.restarts == 1


def test_a_crashing_test_is_named_and_the_others_run(tmp_path):
    watcher, found = watched(
        tmp_path,
        """
        def test_a(): os.kill(os.getpid(), signal.SIGSEGV)
        def test_b(): os._exit(3)
        def test_c(): pass
        """,
    )
    assert "SIGSEGV" in found["test_a"]["message"]
    assert found["test_b"]["outcome"] == "failed"
    assert found["test_c"]["outcome"] == "passed"
    assert watcher.not_run == []


def test_a_broken_device_ends_its_process_and_the_others_run_in_a_new_one(tmp_path):
    watcher, found = watched(
        tmp_path,
        """
        import torch
        def test_a(monkeypatch):
            def broken(*_): raise RuntimeError("CUDA error: an illegal memory access")
            torch.cuda.is_available = lambda: True
            torch.cuda.synchronize = broken
            broken()
        def test_b(): assert not torch.cuda.is_available()
        """,
        limit_s=60.0,
    )
    assert "illegal memory access" in found["test_a"]["message"]
    assert found["test_b"]["outcome"] == "passed"
    assert watcher.restarts == 1


def test_what_there_was_no_time_for_is_listed(tmp_path):
    watcher, found = watched(
        tmp_path,
        """
        def test_a(): pass
        def test_b(): time.sleep(600)
        def test_c(): pass
        """,
        limit_s=100.0,
        seconds=5.0,
    )
    assert found["test_a"]["outcome"] == "passed"
    assert found["test_b"]["message"] == "killed: the time of all tests was over"
    assert [test.rpartition("::")[2] for test in watcher.not_run] == ["test_c"]


def test_tests_that_cannot_be_collected_are_a_failure(tmp_path):
    with pytest.raises(stage.Failure, match=r"pytest.*SyntaxError"):
        watched(tmp_path, "def test_a(:")


def test_the_reporter_gives_errors_in_setup_as_failures(tmp_path):
    _, found = watched(
        tmp_path,
        """
        @pytest.fixture
        def broken(): raise KeyError("nothing")
        def test_a(broken): pass
        """,
    )
    assert found["test_a"]["outcome"] == "failed"
    assert found["test_a"]["message"].startswith("in setup: KeyError")
    assert plugin.BROKEN not in (0, 1, 2, 3, 4, 5)  # pytest's own


def test_the_shares_hold_every_test_once():
    def item(name, **params):
        return SimpleNamespace(nodeid=name, callspec=SimpleNamespace(params=params))

    items = [SimpleNamespace(nodeid="plain"), item("other", dtype=1)]
    items += [item(f"{b}-{i}", backend=b) for i in range(7) for b in ("cuda", "triton")]
    real = SimpleNamespace(serving=lambda: ["cuda", "triton"])
    found = [[i.nodeid for i in plugin.share_of(items, s)] for s in tests.shares(real)]
    assert found[0] == ["plain", "other", *(f"cuda-{i}" for i in range(7))]
    assert [name for part in found[1:] for name in part] == [f"triton-{i}" for i in range(7)]
    assert tests.shares(SimpleNamespace(serving=lambda: ["cuda"])) == ["cuda 1/1"]


# --- the whole -----------------------------------------------------------------------------------


def test_the_stages_leave_time_within_nine_minutes():
    ends = [each.ends_s for each in runner.STAGES]
    assert ends == sorted(ends)
    assert ends[-1] + runner.GRACE_S <= 9 * 60


@pytest.mark.parametrize(
    ("value", "shape", "wrong"),
    [
        ({"a": 1.5}, {"a": float}, None),
        ({"a": 1}, {"a": float, "b?": str}, None),
        ({"a": float("nan")}, {"a": float}, "record.a is float nan"),
        ({"a": True}, {"a": int}, "record.a is bool True"),
        ({}, {"a": int}, "record has no 'a'"),
        ({"a": 1, "c": 2}, {"a": int}, "record has an unknown 'c'"),
        ([1, "x"], [int], "record[1] is str 'x'"),
        ({"k": None}, schema.Each((int, None)), None),
        ({"k": "x"}, schema.Each((int, None)), "record.k is str 'x'"),
        ("green", {"red", "blue"}, "record is 'green', not one of blue, red"),
    ],
)
def test_the_schema_notices(value, shape, wrong):
    found = list(schema.problems(value, shape))
    assert found[0].startswith(wrong) if wrong else not found, found
