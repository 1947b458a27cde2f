"""The command line of the benchmark: what it measures, what it refuses, what it keeps."""

import csv
import fcntl
import io
import itertools
import math
import os
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import torch
from bench_samples import CPU, EAGER, bench, row, some_results

import normnorm.environment
from speed import counts, environment, measure
from speed.options import make_plan, parser
from speed.providers import PROVIDERS, Provider, Unavailable
from speed.results import MODES, load, save

ROOT = Path(__file__).resolve().parents[2]

# The command as a whole


@pytest.mark.serial
def test_the_quick_bench_measures_three_layers_and_two_networks_within_a_minute(tmp_path, capsys):
    files = {name: tmp_path / f"quick.{name}" for name in ("json", "csv", "markdown")}
    began = time.monotonic(), time.process_time()
    outputs = [word for name, path in files.items() for word in (f"--{name}", path)]
    assert bench("--quick", "--device", "cpu", "--threads", 1, *outputs) == 0
    # On a machine that others keep busy the processor's time stands for the clock's.
    assert min(time.monotonic() - began[0], time.process_time() - began[1]) < 60
    output = capsys.readouterr()
    assert output.err == ""  # no bar, since this is no terminal, and nothing to complain about
    found = load(files["json"])
    assert found.complete
    assert (found.problems, found.environment.threads) == ([], 1)
    expected = {name for name in EAGER if name != "normnorm-reference"}
    seen = {(m.layer, m.provider, m.mode, m.operation) for m in found.measurements}
    layers = ("BatchNormalNorm2d", "BatchNormalNorm1d", "LayerNormalNorm")
    work = [("noise", "full"), ("noise", "backward"), ("noise", "forward"), ("eval", "forward")]
    assert seen == {
        (layer, name, *each) for layer in layers for name in expected for each in work
        if name != "copy" or each[1] == "forward"
    }  # fmt: skip
    for m in found.measurements:
        assert m.status == "ok"
        assert min(m.rounds, m.warm_up + 1) >= 3
        assert 0 < m.p20_ms <= m.median_ms <= m.p80_ms
        assert m.error <= m.bound
    assert {(n.status, n.unit) for n in found.networks} == {("ok", "images"), ("ok", "tokens")}
    lines = list(csv.reader(files["csv"].read_text().splitlines()))
    assert {line[1] for line in lines[1:]} == expected
    assert "images/s" in output.out
    assert all(name in files["markdown"].read_text() for name in expected)
    assert bench("compare", files["json"], files["json"]) == 0


def test_a_selection_is_measured_and_nothing_else(tmp_path, capsys, set_threads):
    path = tmp_path / "some.json"
    assert bench(
        "--quick", "--shape", "6x8", "5x7", "--layers", "LayerNormalNorm", "--dtype",
        "float32,bfloat16", "--providers", "torch", "normnorm-cpu", "--modes", "quiet", "noise",
        "--operations", "full", "--device", "cpu", "--budget", "0.01", "--threads", 2,
        "--seed", 3, "--json", path,
    ) == 0  # fmt: skip
    found = load(path)
    assert found.environment.threads == 2
    assert found.environment.seed == 3
    fields = ("layer", "shape", "dtype", "provider", "mode", "operation")
    seen = {tuple(getattr(m, name) for name in fields) for m in found.measurements}
    assert seen == set(itertools.product(
        ["LayerNormalNorm"], [(6, 8), (5, 7)], ["float32", "bfloat16"], ["torch", "normnorm-cpu"],
        ["noise"], ["full"],
    ))  # fmt: skip
    assert found.networks == []
    assert [file.name for file in tmp_path.iterdir()] == ["some.json"]
    assert "bfloat16" in capsys.readouterr().out


def test_the_default_preset_compiles_for_training_with_noise_alone():
    for words, expected in (([], {"noise"}), (["--providers", "compiled-torch"], set(MODES))):
        plan = make_plan(parser().parse_args(["--device", "cpu", "--suites", "tokens", *words]))
        works = [work for work in plan.works if "compiled-torch" in plan.providers_for(work)]
        assert {work.mode for work in works} == expected


def test_a_terminal_sees_the_progress_and_the_remaining_time():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, ROOT / "benchmarks/bench.py", "--quick", "--shape", "4x8", "5x8"]
    options = ["--layers", "LayerNormalNorm", "--providers", "torch", "--budget", "0.01"]
    done = subprocess.run(
        [*command, *options, "--device", "cpu"], stdout=subprocess.PIPE, stderr=theirs, check=True
    )
    os.close(theirs)
    seen = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "passed" in seen
    assert "left, LayerNormalNorm 4x8 float32 noise" in seen
    assert "100 %|" in seen
    assert b"left" not in done.stdout


# The sentence of the refusal: the options.
BAD_OPTIONS = {
    "unknown provider 'apex'; there are torch, ": "--providers torch apex",
    "provider 'cudnn' cannot run here: ": "--providers cudnn",
    "unknown dtype 'float8'; there are float32, ": "--dtype float8",
    "takes inputs of 4 dimensions; got shape 8x16": "--layers BatchNormalNorm2d --shape 8x16",
    "more than one value in a group; got shape 1x16": "--layers BatchNormalNorm1d --shape 1x16",
    "every size must be at least 1; got shape 8x0x4x4": "--shape 8x0x4x4",
    "no layer takes an input of 6 dimensions": "--shape 1x2x3x4x5x6",
    "must be sizes joined by x": "--shape 8,16",
    "--device must be cpu or cuda; got 'tpu'": "--device tpu",
    "torch sees no CUDA device here": "--device cuda",
    "must be a whole number of at least 1; got '0'": "--threads 0",
    "must be a number of seconds above 0; got 'nan'": "--budget nan",
    "nothing is left to measure": "--modes eval --operations backward",
    "contradict each other": "--networks --no-networks",
    "--suites are parts of a preset": "--suites resnet --shape 8x16",
    "networks train in float32 or bfloat16": "--networks --dtype float16",
    "there is no folder": "--csv no/such/folder/x.csv",
}


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_measured(
    sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("speed.measure.measure", lambda *_: pytest.fail("it measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    there = tmp_path / "there.json"
    there.write_text("precious")
    try:
        words = BAD_OPTIONS[sentence].split()
        status = bench("--quick", "--device", "cpu", "--json", there, *words)
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err
    assert there.read_text() == "precious"
    assert [path.name for path in tmp_path.iterdir()] == ["there.json"]


def test_files_that_cannot_be_written_are_refused_at_once(tmp_path, capsys):
    assert bench("--quick", "--json", tmp_path / "a", "--csv", tmp_path / "." / "a") == 2
    assert "--json and --csv name the same file" in capsys.readouterr().err
    assert bench("--quick", "--markdown", tmp_path) == 2
    assert "is a folder" in capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install():
    script = (
        "import sys, bench_samples; sys.modules['tqdm'] = None\n"
        "sys.exit(bench_samples.bench('--quick'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "bench.py: tqdm is not installed: pip install 'normnorm[bench]'\n"


# Providers that fail


def run_tiny(path, *names, shapes=("8x32",)):
    return bench(
        "--shape", *shapes, "--layers", "LayerNormalNorm", "--modes", "noise", "--device", "cpu",
        "--budget", "0.02", "--json", path, "--providers", *names,
    )  # fmt: skip


def doubled_gradient(forward):
    def call(x):
        y = forward(x)
        y.register_hook(lambda grad: 2 * grad)
        return y

    return call


def after(right_calls, then):
    """A runner whose further calls return ``then(output)``."""

    def runner(forward):
        calls = itertools.count()
        return lambda x: then(forward(x)) if next(calls) >= right_calls else forward(x)

    return runner


def out_of_luck(y):
    raise RuntimeError("out of luck\nand more words")


@pytest.mark.parametrize(
    ("tampered", "status", "message"),
    [
        (after(0, lambda y: y + 1e-3), "wrong", "its output is off by"),
        (after(0, lambda y: y * math.nan), "wrong", "its output is off by"),
        (doubled_gradient, "wrong", "its grad_"),
        (after(50, lambda y: y + 1.0), "wrong", "after it was timed, its output is off by"),
        (after(20, out_of_luck), "failed", "RuntimeError: out of luck"),
    ],
)
def test_a_provider_that_is_wrong_or_raises_has_no_times_and_the_others_have(
    tampered, status, message, monkeypatch, tmp_path, capsys
):
    def build(case):
        runner = PROVIDERS["torch"].build(case)
        runner.forward = tampered(runner.forward)
        return runner

    monkeypatch.setitem(PROVIDERS, "broken", Provider("broken", build, normality=False))
    assert run_tiny(tmp_path / "r.json", "broken", "torch", "copy") == 1
    found = load(tmp_path / "r.json")
    assert found.complete
    broken = found.select(provider="broken")
    assert [m.status for m in broken] == [status] * 3
    assert all(m.message.startswith(message) and "\n" not in m.message for m in broken)
    assert status == "failed" or all(m.median_ms is None for m in broken)
    assert len(found.select(provider="torch", status="ok")) == 3
    assert len(found.select(provider="copy", status="ok")) == 1
    assert len(found.problems) == 1
    assert "bench.py: broken on LayerNormalNorm 8x32" in capsys.readouterr().err


def test_work_that_does_not_fit_is_said_and_the_rest_is_measured(monkeypatch, tmp_path, capsys):
    real = measure.measure

    def first_too_large(work, *arguments):
        if work.shape == (8, 32):
            raise torch.OutOfMemoryError("CUDA out of memory.\nAnd much advice.")
        return real(work, *arguments)

    monkeypatch.setattr("speed.measure.measure", first_too_large)
    assert run_tiny(tmp_path / "rest.json", "torch", shapes=("8x32", "4x32")) == 1
    found = load(tmp_path / "rest.json")
    assert {m.shape for m in found.measurements} == {(4, 32)}
    assert found.problems == [
        "LayerNormalNorm 8x32 float32 noise: not measured: OutOfMemoryError: CUDA out of memory."
    ]
    assert found.problems[0] in capsys.readouterr().err


def test_work_that_a_provider_does_not_do_is_no_failure(monkeypatch, tmp_path, capsys):
    def build(case):
        raise Unavailable("it takes a holiday")

    monkeypatch.setitem(PROVIDERS, "idle", Provider("idle", build))
    assert run_tiny(tmp_path / "idle.json", "torch", "idle") == 0
    assert "idle: unavailable: it takes a holiday" in capsys.readouterr().out


def test_an_interrupted_run_keeps_what_it_has_and_what_stood_there(monkeypatch, tmp_path, capsys):
    path = tmp_path / "long.json"
    save(some_results(row()), path)
    before = path.read_bytes()
    real, calls = measure.measure, itertools.count()

    def interrupted(*arguments):
        if next(calls) == 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr("speed.measure.measure", interrupted)
    status = bench(
        "--quick", "--shape", "8x32", "--layers", "LayerNormalNorm", "--providers", "torch",
        "--device", "cpu", "--budget", "0.01", "--json", path,
    )  # fmt: skip
    assert status == 130
    assert path.read_bytes() == before
    kept = load(tmp_path / "long.json.partial")
    assert not kept.complete
    assert {m.mode for m in kept.measurements} == {"noise"}
    assert "long.json.partial" in capsys.readouterr().err


def test_files_are_written_though_nobody_reads_the_table(monkeypatch, tmp_path):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    assert run_tiny(tmp_path / "kept.json", "torch") == 141
    assert load(tmp_path / "kept.json").complete


# Environment and counts


def test_the_environment_is_this_one(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmarks/bench.py", "--csv", "a b"])
    found = environment.after(environment.before(CPU, 5), CPU, 1.25)
    assert found.command_line == "bench.py --csv 'a b'"
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.cpu
    assert (found.seed, found.seconds, found.gpu) == (5, 1.2, None)
    if (ROOT / ".git").exists():
        command = ["git", "rev-parse", "HEAD"]
        at = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        assert at.startswith(found.commit)
    monkeypatch.setattr(sys, "argv", ["/lib/normnorm/__main__.py", "doctor"])
    assert normnorm.environment.command_line() == "normnorm doctor"


@pytest.mark.parametrize("answer", ["580.1, 1700, 2600, 1980, 700.00", None])
def test_a_gpu_is_asked_for_its_driver_and_clocks(answer, monkeypatch):
    class Properties:
        name, major, minor, uuid = "a GPU", 9, 0, "u"
        multi_processor_count, total_memory, L2_cache_size = 132, 150, 60

    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(normnorm.environment, "_run", lambda *c: (asked.append(c), answer)[1])
    found = normnorm.environment.gpu(torch.device("cuda"))
    assert (found.name, found.capability, found.multiprocessors) == ("a GPU", (9, 0), 132)
    known = (found.driver, found.clock_mhz, found.max_clock_mhz, found.power_limit_w)
    assert known == (("580.1", 1700, 1980, 700) if answer else (None,) * 4)
    assert asked[0][-1] == "--id=GPU-u"


def test_counting_without_valgrind_is_said(monkeypatch, capsys):
    monkeypatch.setattr(counts.shutil, "which", lambda name: None)
    arguments = ["--quick", "--shape", "4x8", "--layers", "LayerNormalNorm", "--providers", "torch"]
    assert bench(*arguments, "--device", "cpu", "--budget", "0.01", "--callgrind") == 1
    said = capsys.readouterr().err
    assert "callgrind: counting needs a C++ compiler and valgrind" in said


@pytest.mark.slow
@pytest.mark.skipif(counts.shutil.which("valgrind") is None, reason="needs valgrind")
def test_instructions_of_the_cpu_kernels_are_counted():
    found = counts.count_cpu()
    assert len(found) == 23
    assert {(c.mode, c.operation) for c in found} == {
        ("quiet", "forward"), ("quiet", "backward"), ("noise", "forward"), ("noise", "backward"),
        ("eval", "forward"),
    }  # fmt: skip
    assert all(5 < c.instructions < 200 for c in found)
