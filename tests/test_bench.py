"""The benchmark measures what it says: right providers and medians, whole files, refusals."""

from __future__ import annotations

import csv
import fcntl
import itertools
import json
import math
import os
import struct
import subprocess
import sys
import termios
import time
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from layer_table import LAYERS as LAYER_ROWS
from torch import nn

from normnorm import cli, reference
from normnorm.bench import callgrind, compare, environment, machine_code, measure, memory, timing
from normnorm.bench import case as case_module
from normnorm.bench import networks as networks_module
from normnorm.bench import results as results_module
from normnorm.bench.case import Case, bound, worst_error
from normnorm.bench.measure import Settings
from normnorm.bench.providers import PROVIDERS, Provider, Unavailable, runnable
from normnorm.bench.results import (
    Count,
    Environment,
    Gpu,
    Measurement,
    NetworkMeasurement,
    Results,
    ResultsError,
    load,
    save,
)  # fmt: skip
from normnorm.bench.table import CSV_COLUMNS, csv_text, markdown, text
from normnorm.bench.timing import Timing, copies_beyond_cache, cuda_graph, interleaved
from normnorm.bench.work import LAYERS, RESNET18, RESNET50, Work, WorkError, named_shapes, preset
from normnorm.noise import draw_seed

CPU = torch.device("cpu")
ON_CPU = [name for name, reason in runnable(CPU).items() if reason is None]
EAGER = [name for name in ON_CPU if not PROVIDERS[name].compiled]
DTYPES = ("float32", "bfloat16", "float16")
BRIEF = Settings(budget_s=0.02, min_rounds=2, max_rounds=5)

# One small work a layer class.
SMALL = tuple(
    Work(layer=row.name, shape=row.shape if row.kind != "layer" else (6, 10), groups=row.num_groups,
         suite="test")
    for row in LAYER_ROWS
)  # fmt: skip
TINY = Work(layer="LayerNormalNorm", shape=(8, 32), suite="test")

ENVIRONMENT = Environment(
    timestamp="2025-07-05T12:00:00+00:00", command_line="normnorm bench", normnorm="0.1.0",
    torch="2.13.0", python="3.11.7", packages={"triton": "3.7.1"}, cuda=None, cudnn=None,
    commit="abc", uncommitted=False, backends={"cpu": None}, platform="Linux", cpu="a processor",
    cores=2, threads=2, isa="avx2", load_before=0.1, device="cpu", seed=1,
)  # fmt: skip
GPU = Gpu(
    name="a GPU", capability=(9, 0), multiprocessors=100, memory_bytes=1, l2_bytes=1,
    max_clock_mhz=2000.0,
)  # fmt: skip


def row(provider="torch", median=1.0, spread=0.01, **fields):
    """A measurement of the tiny work."""
    times = {} if median is None else {
        "median_ms": median, "p20_ms": median * (1 - spread), "p80_ms": median * (1 + spread),
        "rounds": 10, "calls": 1,
    }  # fmt: skip
    given = {
        "layer": "LayerNormalNorm", "shape": (8, 32), "dtype": "float32", "status": "ok",
        "memory_format": "contiguous", "mode": "noise", "operation": "full", "method": "wall",
        "suite": "test", "x_name": "elements", "x_value": 256, "model_bytes": 5120,
    }  # fmt: skip
    return Measurement(provider=provider, **{**given, **times, **fields})


def network_row(provider="torch", median=10.0, **fields):
    given = {
        "network": "conv_net", "source": "normnorm", "norm": "BatchNorm2d", "norm_layers": 3,
        "batch": 4, "sample_shape": (3, 32, 32), "unit": "images", "units": 4, "dtype": "float32",
        "memory_format": "contiguous", "status": "ok", "median_ms": median, "p20_ms": median,
        "p80_ms": median, "rounds": 3,
    }  # fmt: skip
    return NetworkMeasurement(provider=provider, **{**given, **fields})


def some_results(*rows, **fields):
    return Results(environment=ENVIRONMENT, measurements=list(rows), complete=True, **fields)


def bench(*arguments):
    return cli.main(["bench", *map(str, arguments)])


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
    assert not found.problems
    assert {m.layer for m in found.measurements} == {
        "BatchNormalNorm2d", "BatchNormalNorm1d", "LayerNormalNorm"
    }  # fmt: skip
    expected = {name for name in EAGER if name != "normnorm-reference"}
    assert {m.provider for m in found.measurements} == expected
    assert {(m.mode, m.operation) for m in found.measurements} == {
        ("noise", "forward"), ("noise", "backward"), ("noise", "full"), ("eval", "forward")
    }  # fmt: skip
    for m in found.measurements:
        assert m.status == "ok"
        assert m.rounds >= 3
        assert 0 < m.p20_ms <= m.median_ms <= m.p80_ms
        assert m.error <= m.bound
    assert {n.unit for n in found.networks} == {"images", "tokens"}
    assert all(n.status == "ok" and n.rate > 0 for n in found.networks)
    assert found.environment.threads == 1
    assert found.environment.seconds > 0
    lines = list(csv.reader(files["csv"].read_text().splitlines()))
    assert tuple(lines[0]) == CSV_COLUMNS
    assert {line[1] for line in lines[1:]} == expected
    for name in expected:
        assert name in files["markdown"].read_text()
        assert name in output.out
    assert bench("compare", files["json"], files["json"]) == 0


def test_a_selection_is_measured_and_nothing_else(tmp_path, capsys):
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
    assert torch.get_num_threads() == 1  # as before
    fields = ("layer", "shape", "dtype", "provider", "mode", "operation")
    seen = {tuple(getattr(m, name) for name in fields) for m in found.measurements}
    assert seen == set(itertools.product(
        ["LayerNormalNorm"], [(6, 8), (5, 7)], ["float32", "bfloat16"], ["torch", "normnorm-cpu"],
        ["noise"], ["full"],
    ))  # fmt: skip
    assert found.networks == []
    assert "bfloat16" in capsys.readouterr().out


def test_a_terminal_sees_the_progress_and_the_remaining_time():
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    command = [sys.executable, "-m", "normnorm", "bench", "--quick", "--shape", "4x8", "5x8"]
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


def test_networks_alone(tmp_path, capsys):
    path = tmp_path / "nets.json"
    arguments = ["--quick", "--networks", "conv_net", "--device", "cpu", "--budget", "0.01"]
    assert bench(*arguments, "--json", path) == 0
    found = load(path)
    assert found.measurements == []
    assert {n.network for n in found.networks} == {"conv_net"}
    assert "images/s" in capsys.readouterr().out


BAD_OPTIONS = {
    "unknown provider 'apex'; there are torch, ": ["--providers", "torch", "apex"],
    "provider 'cudnn' cannot run here: ": ["--providers", "cudnn"],
    "unknown layer 'BatchNorm2d'; there are Batch": ["--layers", "BatchNorm2d"],
    "unknown dtype 'float8'; there are float32, ": ["--dtype", "float8"],
    "unknown mode 'training'; there are noise, ": ["--modes", "training"],
    "unknown operation 'sideways'; there are forward, ": ["--operations", "sideways"],
    "unknown memory format 'nhwc'; there are contig": ["--memory-format", "nhwc"],
    "unknown suite 'alexnet'; there are resnet, ": ["--suites", "alexnet"],
    "unknown network 'alexnet'; there are conv_net, ": ["--networks", "alexnet"],
    "BatchNormalNorm2d takes inputs of 4 dimensions; got shape 8x16": [
        "--layers", "BatchNormalNorm2d", "--shape", "8x16"
    ],
    "needs more than one value in a group; got shape 1x16": [
        "--layers", "BatchNormalNorm1d", "--shape", "1x16"
    ],
    "every size must be at least 1; got shape 8x0x4x4": ["--shape", "8x0x4x4"],
    "no layer takes an input of 6 dimensions": ["--shape", "1x2x3x4x5x6"],
    "must be sizes joined by x": ["--shape", "8,16"],
    "--device must be cpu or cuda; got 'tpu'": ["--device", "tpu"],
    "must be a whole number of at least 1; got '0'": ["--threads", "0"],
    "must be a number of seconds above 0; got 'nan'": ["--budget", "nan"],
    "nothing is left to measure": ["--modes", "eval", "--operations", "backward"],
    "contradict each other": ["--networks", "--no-networks"],
    "--suites are parts of a preset": ["--suites", "resnet", "--shape", "8x16"],
    "networks train in float32 or bfloat16": ["--networks", "--dtype", "float16"],
    "there is no folder": ["--csv", "no/such/folder/x.csv"],
}  # fmt: skip


@pytest.mark.parametrize("sentence", BAD_OPTIONS)
def test_bad_options_are_refused_before_anything_is_measured(
    sentence, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("normnorm.bench.main.measure", lambda *_: pytest.fail("it measured"))
    there = tmp_path / "there.json"
    there.write_text("precious")
    arguments = ["--quick", "--json", there, *BAD_OPTIONS[sentence]]
    if "--device" not in arguments:
        arguments += ["--device", "cpu"]
    try:
        status = bench(*arguments)
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


def test_a_missing_gpu_is_said(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench("--quick", "--device", "cuda") == 2
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_without_its_packages_the_command_says_what_to_install():
    script = (
        "import sys; sys.modules['msgspec'] = sys.modules['tqdm'] = None\n"
        "from normnorm import cli; sys.exit(cli.main(['bench', '--quick']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        'normnorm bench needs msgspec, tqdm: pip install "normnorm[bench]"'
    )


# Providers that fail


def providing(name, runner_of, monkeypatch):
    """A provider that starts as torch's and is then tampered with."""

    def build(case):
        runner = PROVIDERS["torch"].build(case)
        runner.forward = runner_of(runner.forward)
        return runner

    monkeypatch.setitem(PROVIDERS, name, Provider(name, build, normality=False))


def run_tiny(path, *names):
    return bench(
        "--shape", "8x32", "--layers", "LayerNormalNorm", "--modes", "noise", "--device", "cpu",
        "--budget", "0.02", "--json", path, "--providers", *names,
    )  # fmt: skip


@pytest.mark.parametrize("wrong", [1e-3, math.nan])
def test_a_provider_with_wrong_numbers_is_not_timed(wrong, monkeypatch, tmp_path, capsys):
    providing("broken", lambda forward: lambda x: forward(x) + wrong, monkeypatch)
    path = tmp_path / "wrong.json"
    assert run_tiny(path, "broken", "torch") == 1
    found = load(path)
    assert found.complete
    broken = found.select(provider="broken")
    assert len(broken) == 3
    for m in broken:
        assert m.status == "wrong"
        assert m.median_ms is None
        assert "its output is off by" in m.message
    assert all(m.status == "ok" for m in found.select(provider="torch"))
    assert len(found.problems) == 1
    assert "broken on LayerNormalNorm 8x32" in capsys.readouterr().err


def test_wrong_gradients_are_seen_too(monkeypatch, tmp_path):
    class Doubled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    providing("broken", lambda forward: lambda x: Doubled.apply(forward(x)), monkeypatch)
    assert run_tiny(tmp_path / "wrong.json", "broken") == 1
    broken = load(tmp_path / "wrong.json").measurements
    assert {m.status for m in broken} == {"wrong"}
    assert "grad_" in broken[0].message


def test_a_provider_that_turns_wrong_while_it_is_timed_has_no_times(monkeypatch, tmp_path):
    def wearing_out(forward):
        calls = itertools.count()
        return lambda x: forward(x) + (1.0 if next(calls) > 50 else 0.0)

    providing("tired", wearing_out, monkeypatch)
    path = tmp_path / "tired.json"
    assert run_tiny(path, "torch", "tired") == 1
    found = load(path)
    for m in found.select(provider="tired"):
        assert m.status == "wrong"
        assert m.median_ms is None
        assert m.message.startswith("after it was timed, its output is off by")
    assert len(found.select(provider="torch", status="ok")) == 3


def test_a_provider_that_raises_half_way_leaves_the_results_so_far(monkeypatch, tmp_path):
    def failing(forward):
        calls = itertools.count()

        def call(x):
            if next(calls) > 20:
                raise RuntimeError("out of luck\nand more words")
            return forward(x)

        return call

    providing("fragile", failing, monkeypatch)
    path = tmp_path / "half.json"
    assert run_tiny(path, "torch", "fragile", "copy") == 1
    found = load(path)
    fragile = found.select(provider="fragile")
    assert {m.status for m in fragile} == {"failed"}
    assert {m.message for m in fragile} == {"RuntimeError: out of luck"}
    assert {m.error is not None for m in fragile} == {True}
    assert len(found.select(provider="torch", status="ok")) == 3
    assert len(found.select(provider="copy", status="ok")) == 1


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

    monkeypatch.setattr("normnorm.bench.main.measure", interrupted)
    status = bench(
        "--quick", "--shape", "8x32", "--layers", "LayerNormalNorm", "--providers", "torch",
        "--device", "cpu", "--budget", "0.01", "--json", path,
    )  # fmt: skip
    assert status == 1
    assert path.read_bytes() == before
    kept = load(tmp_path / "long.json.partial")
    assert not kept.complete
    assert {m.mode for m in kept.measurements} == {"noise"}
    assert "long.json.partial" in capsys.readouterr().err


# Work


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_presets_cover_every_layer_dtype_mode_and_format(device):
    default, full = preset("default", device), preset("full", device)
    for works in (default, full):
        assert {work.layer for work in works} == set(LAYERS)
        assert {work.mode for work in works} == {"noise", "quiet", "eval"}
        assert {work.memory_format for work in works} == {"contiguous", "channels_last"}
        assert len(works) == len(set(works))
        assert {work.suite for work in works} == {
            "resnet", "features", "tokens", "batch sweep", "channel sweep", "row sweep", "small",
            "group", "instance", "volumes",
        }  # fmt: skip
        rows = {work.shape[-1] for work in works if work.suite == "row sweep"}
        assert min(rows) == 192
    assert {work.dtype for work in full} == {"float32", "bfloat16", "float16"}
    assert {work.operations for work in full if work.mode == "eval"} == {("forward",)}
    assert len(preset("quick", "cpu")) == 6
    assert {work.shape for work in preset("quick", "cpu")} == {
        (8, 64, 28, 28), (8192, 64), (1024, 384)
    }  # fmt: skip
    methods = {work.method for work in full}
    assert methods == ({"wall"} if device == "cpu" else {"graph", "stream"})
    batches = {work.shape[0] for work in preset("full", "cuda") if work.suite == "resnet"}
    assert batches == {32, 64, 128, 256}


@pytest.mark.parametrize(("name", "shapes"), [("resnet18", RESNET18), ("resnet50", RESNET50)])
def test_resnet_shapes_are_those_of_the_network(name, shapes):
    from torchvision import models

    seen = []
    with torch.device("meta"):
        net = getattr(models, name)()
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1:]))
        net(torch.empty(2, 3, 224, 224))
    assert set(shapes) == set(map(tuple, seen))
    assert len(shapes) == len(set(shapes))


def test_shapes_choose_their_layers():
    def layers(*shape):
        return {work.layer for work in named_shapes([], [shape], "quick", "cpu")}

    assert layers(8, 16) == {"BatchNormalNorm1d", "LayerNormalNorm"}
    assert layers(8, 16, 4, 4) == {"BatchNormalNorm2d"}
    assert layers(8, 16, 4, 4, 4) == {"BatchNormalNorm3d"}
    group = named_shapes(["GroupNormalNorm"], [(4, 48, 5)], "quick", "cpu")
    assert {work.groups for work in group} == {16}


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"layer": "GroupNormalNorm", "shape": (2, 6, 4), "groups": 4}, "4 groups do not divide 6"),
        ({"layer": "BatchNormalNorm1d", "shape": (4, 3), "memory_format": "channels_last"},
         "channels_last needs 4 or 5 dimensions; got shape 4x3"),
        ({"layer": "InstanceNormalNorm2d", "shape": (2, 3, 1, 1)}, "more than one value"),
    ],
)  # fmt: skip
def test_impossible_work_is_refused(fields, sentence):
    with pytest.raises(WorkError, match=sentence):
        Work(suite="test", **fields)


def test_model_bytes_count_each_tensor_of_a_pass_once():
    work = Work(layer="LayerNormalNorm", shape=(10, 100), dtype="bfloat16", suite="test")
    assert work.model_bytes("forward") == 2 * 1000 * 2
    assert work.model_bytes("backward") == 3 * 1000 * 2
    assert work.model_bytes("full") == 5 * 1000 * 2


# The check against the reference


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.layer)
@pytest.mark.parametrize("mode", ["noise", "quiet", "eval"])
def test_the_reference_in_chunks_is_the_reference(work, mode, monkeypatch):
    work = replace(work, mode=mode)
    case = Case(work, CPU, 1, 7)
    whole = case.expected(True, 7)
    monkeypatch.setattr(case_module, "_CHUNK", work.elements // 3)
    chunked = case.expected(True, 7)
    assert set(whole) == ({"output"} if mode == "eval" else
                          {"output", "grad_input", "grad_weight", "grad_bias"})  # fmt: skip
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, rtol=1e-12, atol=1e-12)
    # ... and that of the definition with the same seed, asked directly.
    x = case.inputs[0].detach().double()
    torch.manual_seed(7)
    seed = draw_seed(CPU) if mode == "noise" else None
    frozen = None
    if mode == "eval" and case.running is not None:
        frozen = reference.pack_running(*case.running, 1e-5, torch.float64)
    output, _ = reference.normal_norm(
        x, case.weight.double(), case.bias.double(), kind=work.kind, num_groups=work.groups,
        normalized_ndim=int(work.kind == "layer"), seed=seed, frozen=frozen,
        noise_train={"layer": 1.0}.get(work.kind, 0.4) if mode == "noise" else 0.0,
    )  # fmt: skip
    torch.testing.assert_close(whole["output"], output, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.layer)
@pytest.mark.parametrize("mode", ["noise", "eval"])
def test_for_torchs_layer_the_reference_is_torchs_in_float64(work, mode):
    work = replace(work, mode=mode)
    case = Case(work, CPU, 1, 3)
    module = case.module(ours=False).double()
    x = case.inputs[0].detach().double().requires_grad_()
    output = module(x)
    expected = case.expected(False, 3)
    torch.testing.assert_close(expected["output"], output.detach(), rtol=1e-10, atol=1e-10)
    if mode == "noise":
        gradients = torch.autograd.grad(
            output, (x, module.weight, module.bias), case.grads[0].double()
        )
        for name, value in zip(("grad_input", "grad_weight", "grad_bias"), gradients, strict=True):
            torch.testing.assert_close(expected[name], value, rtol=1e-9, atol=1e-9)


FAST = {("float32", "noise"), ("float32", "quiet"), ("float32", "eval"), ("bfloat16", "noise")}


@pytest.mark.parametrize("work", SMALL, ids=lambda work: work.layer)
@pytest.mark.parametrize(
    ("dtype", "mode"),
    [
        pytest.param(*both, marks=() if both in FAST else pytest.mark.slow)
        for both in itertools.product(DTYPES, ("noise", "quiet", "eval"))
    ],
)
def test_every_eager_provider_does_every_layer(work, dtype, mode):
    rows = measure.measure(replace(work, dtype=dtype, mode=mode), EAGER, CPU, BRIEF)
    assert {(m.provider, m.status, m.message) for m in rows} == {(n, "ok", None) for n in EAGER}
    for m in rows:
        assert m.rounds >= 2
        assert m.error <= m.bound
        assert m.ratio is None if m.provider == "copy" else m.ratio > 0
        assert (m.kept_bytes is None) == (mode == "eval" or m.provider == "copy")


def test_channels_last_inputs_stay_so_and_are_checked():
    work = Work(
        layer="BatchNormalNorm2d", shape=(4, 6, 5, 3), memory_format="channels_last", suite="test"
    )
    case = Case(work, CPU, 2, 1)
    for x in (*case.inputs, *case.grads):
        assert x.is_contiguous(memory_format=torch.channels_last)
        assert (x != 0).all()
    assert not case.inputs[0].equal(case.inputs[1])
    rows = measure.measure(work, EAGER, CPU, BRIEF)
    assert {m.status for m in rows} == {"ok"}


@pytest.mark.parametrize(
    "mode", ["noise", *(pytest.param(m, marks=pytest.mark.slow) for m in ("quiet", "eval"))]
)
@pytest.mark.parametrize(
    "work",
    [pytest.param(w, id=w.layer, marks=() if w.layer == "LayerNormalNorm" else pytest.mark.slow)
     for w in SMALL],
)  # fmt: skip
def test_compiled_providers_match_the_reference_too(work, mode):
    names = [name for name in ON_CPU if PROVIDERS[name].compiled]
    assert names == ["compiled-reference", "compiled-torch"]
    rows = measure.measure(replace(work, mode=mode), names, CPU, BRIEF)
    assert {(m.provider, m.status, m.message) for m in rows} == {(n, "ok", None) for n in names}


def test_a_backend_provider_runs_that_backend(monkeypatch):
    from normnorm import backends

    served = []
    for name in ("cpu", "reference"):
        right = backends.get(name)
        recorded = replace(
            right, forward=lambda *a, n=name, f=right.forward: (served.append(n), f(*a))[1]
        )
        monkeypatch.setitem(backends._backends, name, recorded)
    for name in ("cpu", "reference"):
        served.clear()
        measure.measure(TINY, [f"normnorm-{name}"], CPU, BRIEF)
        assert set(served) == {name}


def test_libraries_that_are_not_there_are_named():
    reasons = runnable(CPU)
    assert "cuda tensors" in reasons["cudnn"]
    for name, package in (("liger", "liger-kernel"), ("quack", "quack-kernels")):
        assert reasons[name] is not None
        assert package in reasons[name]


def test_the_worst_error_is_relative_and_nan_is_worst():
    value = {"output": torch.tensor([4.0, 1.0]), "grad_input": torch.tensor([10.0])}
    off = {"output": torch.tensor([4.0, 1.4]), "grad_input": torch.tensor([10.5])}
    assert worst_error(off, value) == ("output", pytest.approx(0.1))
    off["grad_input"] = torch.tensor([math.nan])
    assert worst_error(off, value) == ("grad_input", math.inf)
    assert bound(TINY) < 1e-5 < bound(replace(TINY, dtype="bfloat16")) < 0.02


def test_the_ratio_is_to_the_faster_of_torchs():
    rows = [row("torch", 2.0), row("cudnn", 1.0), row("normnorm-cuda", 1.5), row("copy", 0.1)]
    found = {r.provider: measure._with_ratio(r, rows) for r in rows}
    assert found["normnorm-cuda"].ratio == 1.5
    assert found["normnorm-cuda"].peer == "cudnn"
    assert found["torch"].ratio == 2.0
    assert found["copy"].ratio is None
    failed = row("torch", None, status="failed", message="it did")
    assert measure._with_ratio(row("normnorm-cuda", 1.5), [failed]).ratio is None


# Timing


def test_percentiles_are_numpys():
    samples = [3.0, 1.0, 7.0, 2.0, 9.0, 4.0]
    timing = Timing.of(samples, 5)
    expected = np.percentile(samples, [50, 20, 80])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == pytest.approx(tuple(expected))
    assert (timing.rounds, timing.calls) == (6, 5)
    assert Timing.of([3.0], 1) == (3.0, 3.0, 3.0, 1, 1)


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def call(self, name, seconds):
        def run(copy):
            self.now += seconds() if callable(seconds) else seconds
            self.log.append((name, copy))

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_medians_of_calls_in_alternation(clock):
    durations = itertools.cycle([1e-3, 3e-3, 2e-3])
    calls = {
        "fast": clock.call("fast", 1e-6),
        "varying": clock.call("varying", lambda: next(durations)),
        "slow": clock.call("slow", 0.1),
    }
    found = interleaved(calls, budget_s=1.5, min_rounds=4, max_rounds=50)
    assert list(found) == list(calls)
    assert found["fast"].median_ms == pytest.approx(1e-3)
    assert found["fast"].calls >= 500  # a sample is longer than what a clock can tell
    assert found["varying"].median_ms == pytest.approx(2.0)
    assert found["varying"].rounds == 50
    assert found["slow"].rounds == 5  # a third of the time
    # The slow one's samples are spread over the whole measurement, not done first.
    log = [name for name, _ in clock.log]
    first = log.index("slow", log.index("slow") + 2)
    between = [len([n for n in log[i:j] if n == "varying"]) for i, j in itertools.pairwise(
        [i for i, n in enumerate(log) if n == "slow" and i >= first])]  # fmt: skip
    assert min(between) >= 5


def test_a_machine_that_becomes_slow_ends_the_measurement_early(clock):
    """A hundred samples were counted out, each then takes a thousand times as long."""
    durations = itertools.chain([1e-3] * 5, itertools.repeat(1.0))
    calls = {
        "a": clock.call("a", lambda: next(durations)), "b": clock.call("b", lambda: next(durations))
    }  # fmt: skip
    found = interleaved(calls, budget_s=2.0, min_rounds=4)
    assert found["a"].rounds + found["b"].rounds <= 10
    assert min(found["a"].rounds, found["b"].rounds) >= 4


def test_what_takes_longer_than_its_share_is_sampled_three_times(clock):
    calls = {"a": clock.call("a", 1e-3), "slow": clock.call("slow", 10.0)}
    found = interleaved(calls, budget_s=1.0, min_rounds=7)
    assert found["slow"].rounds == 3
    assert found["a"].rounds >= 7


def test_contexts_surround_samples_outside_the_clock(clock):
    @contextmanager
    def context():
        clock.now += 1.0
        yield
        clock.now += 1.0

    calls = {"inside": clock.call("inside", 2e-3), "bare": clock.call("bare", 2e-3)}
    found = interleaved(calls, within={"inside": context}, budget_s=0.1)
    assert found["inside"].median_ms == pytest.approx(2.0)
    assert found["bare"].median_ms == pytest.approx(2.0)


def test_every_copy_of_the_inputs_has_its_turn(clock):
    interleaved({"a": clock.call("a", 1e-4)}, copies=3, budget_s=0.01)
    assert {copy for _, copy in clock.log} == {0, 1, 2}


def test_a_call_that_raises_is_returned_and_the_others_are_timed(clock):
    def at_once(copy):
        raise ValueError("no")

    count = itertools.count()

    def later(copy):
        clock.now += 1e-3
        if next(count) > 5:
            raise ValueError("no more")

    calls = {"at once": at_once, "later": later, "fine": clock.call("fine", 1e-3)}
    found = interleaved(calls, budget_s=0.1)
    assert str(found["at once"]) == "no"
    assert str(found["later"]) == "no more"
    assert found["fine"].median_ms == pytest.approx(1.0)


def test_real_time_is_measured_in_milliseconds():
    found = interleaved({"nap": lambda copy: time.sleep(0.003)}, budget_s=0.05)
    assert 3.0 <= found["nap"].median_ms < 30
    assert copies_beyond_cache(8, CPU) == 1


@pytest.fixture
def pretended_gpu(clock, monkeypatch):
    """What the timer asks of torch.cuda, kept by the fake clock: a replay takes a millisecond for
    each call that was captured, and nothing passes on the host."""

    class Graph:
        def replay(self):
            clock.now += 1e-3 * self.calls
            clock.replays += 1

    @contextmanager
    def capture(graph, stream):
        before = len(clock.log)
        yield
        graph.calls = len(clock.log) - before

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    def sleep(cycles):
        clock.now += 1e-4  # before the first event: in no sample

    clock.replays = 0
    pretended = {
        "Stream": Stream, "current_stream": lambda device: Stream(), "CUDAGraph": Graph,
        "graph": capture, "Event": Event, "_sleep": sleep, "synchronize": lambda device: None,
        "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
        "get_device_properties": lambda device: type("P", (), {"L2_cache_size": 60 << 20}),
    }  # fmt: skip
    for name, fake in pretended.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    timing.capture_stream.cache_clear()
    yield clock
    timing.capture_stream.cache_clear()


def test_graphs_hold_a_call_for_each_copy(pretended_gpu):
    clock, device = pretended_gpu, torch.device("cuda")
    assert copies_beyond_cache(50 << 20, device) == 4
    assert copies_beyond_cache(200 << 20, device) == 1
    assert copies_beyond_cache(16, device) == 256
    found = interleaved(
        {"a": clock.call("a", 0.0)}, device, copies=4, budget_s=0.04, min_rounds=3, max_rounds=8
    )
    assert clock.log == [("a", copy) for _ in range(3) for copy in range(4)]  # 2 turns, 1 capture
    assert found["a"].median_ms == pytest.approx(1.0)
    assert found["a"].calls == 4
    assert found["a"].rounds == 8
    assert clock.replays == 2 + 8


def test_launches_are_timed_from_the_host(pretended_gpu):
    clock = pretended_gpu
    calls = {"a": clock.call("a", 2e-5)}
    found = interleaved(calls, torch.device("cuda"), method="stream", budget_s=0.01)
    assert found["a"].median_ms == pytest.approx(0.02)
    assert found["a"].calls >= 25
    assert clock.replays == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_time_the_device_and_rotate_over_more_than_the_cache():
    device = torch.device("cuda")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    each = 1 << 22
    copies = copies_beyond_cache(each, device)
    assert 3 * cache <= copies * each < 3 * cache + each
    xs = [torch.randn(each // 4, device=device) for _ in range(copies)]
    seen = torch.zeros(copies, device=device)

    def call(copy):
        seen[copy] += 1
        return xs[copy] * 2

    cuda_graph(call, copies, device).replay()
    torch.cuda.synchronize()
    assert (seen == 3).all()  # two turns before the capture, and one replay
    found = interleaved({"graph": call}, device, copies=copies, budget_s=0.2)
    assert 1e-4 < found["graph"].median_ms < 1


# Memory


def test_kept_bytes_count_each_storage_once():
    x = torch.randn(10, 20, requires_grad=True)
    assert memory.kept_bytes(lambda: x * x) == 800
    y = torch.randn(10, 20)
    assert memory.kept_bytes(lambda: (x * y, x * 3.0)) == 800


def test_peak_bytes_of_a_chain_of_temporaries(capfd):
    x = torch.randn(1000)
    assert memory.peak_bytes(lambda: x.clone(), CPU) == 4000
    assert memory.peak_bytes(lambda: x.clone().clone().clone(), CPU) == 8000
    assert memory.peak_bytes(lambda: [x.clone(), x.clone(), x.clone()], CPU) == 12000
    assert memory.peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""


# Networks


def test_networks_get_the_norm_layers_they_are_told_to():
    conv, encoder = networks_module.networks("quick", "cpu")
    for network, layers in ((replace(conv, batch=2), 3), (replace(encoder, batch=1), 9)):
        rows = networks_module.measure_network(network, ["torch", "normnorm-cpu"], CPU, BRIEF)
        assert [r.status for r in rows] == ["ok", "ok"]
        assert [r.norm_layers for r in rows] == [layers, layers]
        assert rows[1].norm == network.layer
        assert rows[0].ratio == 1
        assert rows[0].rate == pytest.approx(rows[0].units / rows[0].median_ms * 1e3)
        assert all(r.peak_bytes > 0 for r in rows)


def test_a_network_step_trains():
    network = networks_module.networks("quick", "cpu")[0]
    training = networks_module._Training(network, "normnorm-cpu", CPU, 1)
    training.optimizer.param_groups[0]["lr"] = 0.01
    losses = []
    for _ in range(15):
        training()
        losses.append(training.loss.item())
    assert losses[-1] < losses[0] / 2


def test_a_network_that_diverges_is_wrong_and_a_missing_library_is_said():
    network = networks_module.networks("quick", "cpu")[0]

    class Diverging(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10), norm(1))

        def forward(self, x):
            return self.net[1](self.net[0](x)) * math.inf

    rows = networks_module.measure_network(
        replace(network, build=Diverging), ["torch"], CPU, BRIEF
    )
    assert rows[0].status == "wrong"
    assert "the loss is nan" in rows[0].message
    absent = networks_module.measure_network(
        replace(network, source="no_such_library"), ["torch"], CPU, BRIEF
    )
    assert absent[0].status == "unavailable"
    assert "no_such_library does not import" in absent[0].message


# Result files


def test_what_is_saved_is_loaded(tmp_path):
    found = some_results(
        row(), row("broken", None, status="wrong", message="it was off"),
        networks=[network_row()], counts=[
            Count(work="w", mode="noise", operation="forward", isa="avx2", instructions=3.5)
        ], problems=["one"],
    )  # fmt: skip
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda")
    path = tmp_path / "r.json"
    save(found, path)
    assert load(path) == found
    data = json.loads(path.read_text())
    assert data["format"] == "normnorm-bench"
    assert data["version"] == 1


def put(old, new):
    return lambda text: text.replace(old, new)


DAMAGED = {
    "is damaged or not JSON": lambda text: text[: len(text) // 2],
    "is damaged or not JSON at all": lambda text: "\x7fELF",
    'has no "format"': lambda text: "[]",
    "its format is 'pytest-benchmark'": put("normnorm-bench", "pytest-benchmark"),
    "is of version 99": put('"version": 1,', '"version": 99,'),
    "Expected `float | null`": put('"median_ms": 1.0', '"median_ms": "fast"'),
    "missing required field `provider`": put('"provider"', '"who"'),
    "Invalid enum value 'sideways'": put('"full"', '"sideways"'),
    "says ok, but its times are": put('"median_ms": 1.0', '"median_ms": -1.0'),
    "says failed, but not why": put('"status": "ok"', '"status": "failed"'),
}  # fmt: skip


@pytest.mark.parametrize("sentence", DAMAGED)
def test_damaged_and_foreign_files_are_refused_in_words(sentence, tmp_path, capsys):
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    save(some_results(row()), good)
    bad.write_text(DAMAGED[sentence](good.read_text()))
    with pytest.raises(ResultsError) as refusal:
        load(bad)
    assert sentence in str(refusal.value)
    assert str(bad) in str(refusal.value)
    assert bench("compare", good, bad) == 2
    assert sentence in capsys.readouterr().err


def test_files_that_are_no_text_or_not_there_are_refused_too(tmp_path):
    path = tmp_path / "binary.json"
    path.write_bytes(bytes(range(256)))
    for bad in (path, tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(ResultsError):
            load(bad)
        assert bench("compare", bad, bad) == 2


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    save(some_results(row()), path)
    path.chmod(0o640)
    before = path.read_bytes()

    def full_disk(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(results_module.os, "fsync", full_disk)
        with pytest.raises(ResultsError, match="No space left on device"):
            save(some_results(row(), row("copy")), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    link = tmp_path / "link.json"
    link.symlink_to(path)
    save(some_results(row(), row("copy")), link)
    assert link.is_symlink()
    assert len(load(path).measurements) == 2
    assert path.stat().st_mode & 0o777 == 0o640
    with pytest.raises(ResultsError, match="cannot write"):
        save(some_results(row()), tmp_path / "no" / "folder.json")


def test_rates_and_shares_follow_from_the_rows():
    mine = row("normnorm-cpu", 2.0, model_bytes=8_000_000)
    copy = row("copy", 1.0, operation="forward", model_bytes=8_000_000)
    other = replace(copy, mode="eval", median_ms=0.5)
    found = some_results(mine, other, copy)
    assert mine.gb_per_s == pytest.approx(4.0)
    assert found.share_of_copy(mine) == pytest.approx(0.5)
    assert found.share_of_copy(replace(mine, shape=(1, 2))) is None
    assert network_row(median=20.0).rate == pytest.approx(200.0)


def test_the_issue_roof_is_instructions_over_lanes_and_clock():
    counts = [
        Count(work="w", mode="noise", operation=operation, isa="sm_90", instructions=each)
        for operation, each in (("forward", 40.0), ("backward", 60.0))
    ]
    found = some_results(counts=counts)
    found.environment = replace(ENVIRONMENT, gpu=GPU, device="cuda")
    # 100 multiprocessors issue 128 lanes 2e6 times a millisecond: 2.56e8 elements of 100 each.
    mine = row("normnorm-cuda", 2.0, shape=(256_000_000,))
    assert found.share_of_issue(mine) == pytest.approx(0.5)
    assert found.share_of_issue(replace(mine, operation="forward")) == pytest.approx(0.2)
    assert found.share_of_issue(replace(mine, mode="quiet")) is None
    assert found.share_of_issue(replace(mine, dtype="bfloat16")) is None
    assert found.share_of_issue(replace(mine, provider="torch")) is None
    assert some_results(counts=counts).share_of_issue(mine) is None


def test_instructions_of_the_cuda_kernels_are_those_that_the_tests_keep():
    stored = json.loads((Path(__file__).parent / "data/sass_budgets.json").read_text())
    newest = stored[max(stored, key=lambda version: tuple(map(int, version.split("."))))]
    counts = machine_code.cuda_counts((9, 0))
    assert {(c.operation, c.mode, c.dtype) for c in counts} == set(
        itertools.product(("forward", "backward"), ("noise", "quiet"), DTYPES)
    )
    for c in counts:
        assert c.isa == "sm_90"
    noisy = {(c.operation, c.dtype): c.instructions for c in counts if c.mode == "noise"}
    for (operation, dtype), instructions in noisy.items():
        assert instructions == newest["sm_90"][f"{operation}_noise_{dtype}"]["instructions"]
    assert machine_code.cuda_counts((1, 0)) == []


# Text


def test_csv_has_ligers_columns_and_all_the_numbers():
    found = some_results(
        row("torch", 2.0, peak_bytes=2**20), row("idle", None, status="unavailable", message="no")
    )
    lines = list(csv.DictReader(csv_text(found).splitlines()))
    assert list(lines[0]) == [
        "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
        "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
        "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
    ]  # fmt: skip
    assert [(line["metric_name"], line["metric_unit"]) for line in lines] == [
        ("speed", "ms"), ("memory", "MB")
    ]  # fmt: skip
    assert [float(line["y_value_50"]) for line in lines] == [2.0, 1.0]
    assert json.loads(lines[0]["extra_benchmark_config_str"])["shape"] == [8, 32]
    assert lines[0]["gpu_name"] == "a processor"


def test_the_tables_say_what_failed_and_where_it_was_measured():
    found = some_results(
        row("torch", 2.0, ratio=1.0, peer="torch", kept_bytes=1500, error=1e-7, bound=1e-5),
        row("normnorm-cpu", 3.0, ratio=1.5, peer="torch"),
        row("broken", None, status="wrong", message="it was off"),
        networks=[network_row()], problems=["broken on it: wrong: it was off"],
    )  # fmt: skip
    for words in (text(found), markdown(found)):
        assert "LayerNormalNorm 8x32 float32, training with noise" in words
        assert "broken: wrong: it was off" in words
        assert "1.5 kB" in words
        assert "a processor, 2 threads on 2 cores" in words
        assert "torch 2.13.0" in words
        assert "400" in words  # images a second
    table = markdown(found)
    assert "| normnorm-cpu |" in table
    assert all(line.count("|") > 5 for line in table.splitlines() if line.startswith("|"))


def test_means_over_works_are_geometric():
    rows = [
        row(p, 1.0, shape=(8, n), ratio=ratio)
        for p, n, ratio in (("torch", 1, 1.0), ("a", 1, 0.5), ("a", 2, 2.0), ("b", 1, 3.0))
    ]
    words = text(some_results(*rows))
    mean = next(line for line in words.splitlines() if line.startswith("test "))
    assert mean.split() == ["test", "float32", "contiguous", "noise", "2", "1.00", "3.00", "(1)"]


# Comparison


def comparison(before, after, tmp_path):
    """The exit status of `normnorm bench compare` on two lists of rows."""
    for name, rows in (("a", before), ("b", after)):
        nets = [r for r in rows if isinstance(r, NetworkMeasurement)]
        layers = [r for r in rows if isinstance(r, Measurement)]
        save(some_results(*layers, networks=nets), tmp_path / f"{name}.json")
    return bench("compare", tmp_path / "a.json", tmp_path / "b.json")


def test_a_slowdown_beyond_the_noise_is_found(tmp_path, capsys):
    assert comparison([row("torch", 1.0)], [row("torch", 1.2)], tmp_path) == 1
    words = capsys.readouterr().out
    assert "+20%" in words
    assert "±1%" in words
    assert "1 slower, 0 faster" in words


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((1.0, 0.01), (1.04, 0.01)),  # too little to be called a change
        ((1.0, 0.15), (1.2, 0.15)),  # within the noise
        ((1.2, 0.01), (1.0, 0.01)),  # faster
    ],
)
def test_what_is_no_slowdown_is_not_called_one(before, after, tmp_path, capsys):
    assert comparison([row("torch", *before)], [row("torch", *after)], tmp_path) == 0
    assert "0 slower" in capsys.readouterr().out


def test_one_long_sample_does_not_make_a_change():
    before = row("torch", 1.0)
    after = replace(row("torch", 1.2), p20_ms=1.15, p80_ms=2.0)
    assert not compare.changes(some_results(before), some_results(after))[0].significant


def test_a_slower_machine_shows_beside_the_slowdown():
    before = [row("torch", 1.0), row("a", 2.0, ratio=2.0)]
    after = [row("torch", 2.0), row("a", 4.0, ratio=2.0)]
    found = compare.changes(some_results(*before), some_results(*after))
    a = next(change for change in found if change.name.endswith("full, a"))
    assert a.significant
    assert a.against_torch == 1.0


def test_networks_are_compared_and_a_new_failure_counts(tmp_path, capsys):
    assert comparison([network_row()], [network_row(median=20.0)], tmp_path) == 1
    assert "conv_net batch 4" in capsys.readouterr().out
    failed = row("torch", None, status="failed", message="it broke")
    assert comparison([row("torch"), row("a")], [failed, row("a")], tmp_path) == 1
    assert "it broke" in capsys.readouterr().out


def test_files_without_anything_in_common_are_refused(tmp_path, capsys):
    assert comparison([row("torch")], [row("copy")], tmp_path) == 2
    assert "no measurement in common" in capsys.readouterr().err


def test_other_machines_and_versions_are_named():
    other = replace(ENVIRONMENT, threads=1, torch="2.14.0", packages={}, gpu=GPU)
    assert list(compare.differences(ENVIRONMENT, other)) == [
        "threads: 2 before, 1 after", "torch: 2.13.0 before, 2.14.0 after",
        "gpu: None before, a GPU after", "triton: 3.7.1 before, None after",
    ]  # fmt: skip
    assert list(compare.differences(ENVIRONMENT, ENVIRONMENT)) == []


# Environment and counts


def test_the_environment_is_this_one():
    found = environment.after(environment.before(CPU, 5), CPU, 1.25)
    assert found.torch == torch.__version__
    assert found.threads == torch.get_num_threads()
    assert found.cores >= 1
    assert found.cpu
    assert found.seed == 5
    assert found.seconds == 1.2
    assert found.gpu is None
    root = Path(__file__).resolve().parents[1]
    if (root / ".git").exists():
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
        assert commit.startswith(found.commit)
    assert json.loads(msgspec.json.encode(found))["seed"] == 5


@pytest.mark.parametrize(
    ("argv", "typed"),
    [
        (["/usr/bin/normnorm", "bench", "--csv", "a b"], "normnorm bench --csv 'a b'"),
        (["/lib/normnorm/__main__.py", "bench"], "normnorm bench"),
        (["benchmarks/cpu_layers.py"], "cpu_layers.py"),
    ],
)
def test_the_command_line_is_kept_as_it_was_typed(argv, typed, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    assert environment.before(CPU, 1).command_line == typed


def test_counting_without_valgrind_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(callgrind.shutil, "which", lambda name: None)
    with pytest.raises(callgrind.CallgrindError, match=r"needs a C\+\+ compiler and valgrind"):
        callgrind.count()
    arguments = ["--quick", "--shape", "4x8", "--layers", "LayerNormalNorm", "--providers", "torch"]
    assert bench(*arguments, "--device", "cpu", "--budget", "0.01", "--callgrind") == 1
    assert "callgrind: counting needs" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(callgrind.shutil.which("valgrind") is None, reason="needs valgrind")
def test_instructions_of_the_cpu_kernels_repeat_exactly():
    counts = callgrind.count()
    assert len(counts) == 23
    assert {(c.mode, c.operation) for c in counts} == {
        ("quiet", "forward"), ("quiet", "backward"), ("noise", "forward"), ("noise", "backward"),
        ("eval", "forward"),
    }  # fmt: skip
    assert all(5 < c.instructions < 200 for c in counts)
    assert callgrind.count() == counts
