"""The command line: doctor and gradcheck say what is true, and fail when a kernel is wrong; no
command ends in a traceback for a closed pipe, Ctrl-C, a wrong device or a file in the way."""

import errno
import json
import os
import subprocess
import sys
from dataclasses import replace
from unittest import mock

import pytest
import torch

import normnorm
from normnorm import backends, cli, selfcheck
from normnorm.backends import cuda


@pytest.fixture
def wrong(monkeypatch):
    """A function that puts a backend with wrong functions in the place of a real one; of the
    checks only those of the first layer are made."""

    def put(**functions):
        monkeypatch.setattr(selfcheck, "CASES", selfcheck.CASES[:2])
        monkeypatch.setattr(backends, "_backends", dict(backends._backends))
        monkeypatch.setattr(backends, "_automatic", dict(backends._automatic))
        right = backends.get("reference")
        backends.register(replace(right, name="cpu", device_type="cpu", **functions))

    return put


def one_per_mille_off(*arguments):
    grad_input, grad_weight, grad_bias = backends.get("reference").backward(*arguments)
    return grad_input * 1.001, grad_weight, grad_bias


def report(capsys, *words, status=0):
    """What ``doctor --json`` says."""
    assert cli.main(["doctor", "--json", *words]) == status
    return json.loads(capsys.readouterr().out)


def test_doctor_reports_versions_backends_and_passing_checks(capsys):
    found = report(capsys)
    assert found["ok"] is True
    assert found["environment"]["torch"] == torch.__version__
    assert found["backends"] == normnorm.available_backends()
    checked = {(check["layer"], check["backend"]) for check in found["checks"]}
    available = [name for name, why in found["backends"].items() if why is None]
    assert checked == {(case.layer, name) for case in selfcheck.CASES for name in available}
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert all(name in text and (why or "") in text for name, why in found["backends"].items())
    assert " 0 missed" in text


def test_doctor_without_checks_runs_no_layer(wrong, capsys):
    wrong(backward=one_per_mille_off)
    found = report(capsys, "--no-checks")
    assert found["checks"] == []
    assert found["environment"]["torch"] == torch.__version__
    assert cli.main(["doctor", "--no-checks"]) == 0
    assert "missed" not in capsys.readouterr().out


def test_show_config_returns_what_doctor_prints_as_json(wrong, capsys):
    wrong(backward=one_per_mille_off)
    printed, returned = report(capsys, status=1), normnorm.show_config()
    assert capsys.readouterr().out == ""
    for found in (printed, returned):  # clocks change between the calls
        for gpu in found["environment"]["gpu"]:
            del gpu["clock_mhz"], gpu["memory_clock_mhz"]
    assert json.loads(json.dumps(returned)) == printed


def test_doctor_and_gradcheck_exit_1_on_a_wrong_kernel(wrong, monkeypatch, capsys):
    wrong(backward=one_per_mille_off)
    for words in (["doctor"], ["gradcheck", "--backend", "cpu"]):
        assert cli.main(words) == 1
        assert "MISS" in capsys.readouterr().out
    broken = mock.Mock(side_effect=RuntimeError("this kernel is broken"))
    monkeypatch.setattr(selfcheck, "worst_errors", broken)
    assert cli.main(["doctor"]) == 1
    assert "this kernel is broken" in capsys.readouterr().out


@pytest.fixture
def no_checks(monkeypatch):
    """A doctor that looks at everything but the numbers."""
    monkeypatch.setattr(selfcheck, "cases_and_backends", list)


NO_NAME = f"NORMNORM_BACKEND must be 'auto' or one of {', '.join(backends.NAMES)}; got "


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ("foo", NO_NAME + "'foo'"), ("", NO_NAME + "''"),
        ("cuda", "backend 'cuda' is unavailable: no such GPU"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("no_checks")
def test_doctor_exits_1_where_the_environment_chooses_what_cannot_run(
    chosen, sentence, monkeypatch, capsys
):
    without = {name: backend for name, backend in backends._backends.items() if name != "cuda"}
    monkeypatch.setattr(backends, "_backends", without)
    monkeypatch.setattr(backends, "_late", {})
    monkeypatch.setattr(backends, "_UNAVAILABLE", dict.fromkeys(backends.NAMES, "no such GPU"))
    monkeypatch.setenv("NORMNORM_BACKEND", chosen)
    assert cli.main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert sentence in text
    assert f"NORMNORM_BACKEND is '{chosen}', with which every call of a layer raises" in text
    found = report(capsys, status=1)
    assert found["ok"] is False
    assert found["wrong_choice"] == sentence


@pytest.mark.parametrize(
    ("recorded", "status"), [("failed: a.cpp:1:2: error: x", 1), ("left out: NORMNORM_NATIVE=0", 0)]
)
@pytest.mark.usefixtures("no_checks")
def test_doctor_exits_1_on_a_failed_build_and_not_on_one_left_out(
    recorded, status, tmp_path, monkeypatch, capsys
):
    (tmp_path / "_C.txt").write_text(recorded + "\n")
    monkeypatch.setattr(backends.cpu, "WITHOUT", tmp_path / "_C.txt")
    assert cli.main(["doctor"]) == status
    text = capsys.readouterr().out
    assert ("the build of the compiled kernels failed:\na.cpp:1:2: error: x\n" in text) == status
    found = report(capsys, status=status)
    assert found["build_failure"] == ("a.cpp:1:2: error: x" if status else None)


def test_gradcheck_passes_on_every_available_backend(capsys):
    assert cli.main(["gradcheck"]) == 0
    text = capsys.readouterr().out
    assert all(case.layer in text for case in selfcheck.CASES)
    assert " 0 missed" in text


@pytest.mark.parametrize("name", ["forward", "fold"])
def test_a_wrong_forward_or_fold_is_seen_too(name, wrong):
    right = backends.get("reference")

    def forward(*arguments):
        output, *others = right.forward(*arguments)
        return output + 1e-3, *others

    def fold(stats, *arguments):
        return right.fold(stats * 1.01, *arguments)

    wrong(**{name: {"forward": forward, "fold": fold}[name]})
    batch = [
        row for row in selfcheck.table("cpu")
        if row["layer"].startswith("Batch") and row["mode"] == "training"
    ]  # fmt: skip
    assert not any(row["passed"] for row in batch if row["dtype"] in ("float64", "float32"))


# --- doctor --plan ---

without_kernels = pytest.mark.skipif(cuda.missing() is not None, reason=str(cuda.missing()))


def plan(capsys, *words):
    return report(capsys, "--plan", *words)


@without_kernels
def test_plan_says_in_words_what_serves_both_passes_and_on_what_device(capsys):
    assert cli.main(["doctor", "--plan", "256,64,56,56", "--device-model", "H200"]) == 0
    text = capsys.readouterr().out
    assert "kind batch, shape (256, 64, 56, 56), float32, contiguous" in text
    assert "on H200 (assumed, as asked): 132 multiprocessors" in text
    assert "64 groups of 802816 elements, in the rows layout" in text
    lines = {line.split()[0]: line for line in text.splitlines() if line}
    assert "co-operating blocks" in lines["forward"]
    assert lines["backward"].split()[-1].isdigit()


@without_kernels
def test_plan_follows_the_size_of_a_group(capsys):
    on = ("--device-model", "H200", "--dtype", "bfloat16")
    short = plan(capsys, "8192,512", "--kind", "layer", *on)["forward"]
    assert short["tier"] == "warp, registers"
    assert (short["threads"], short["groups"], short["group_size"]) == (32, 8192, 512)
    middle = plan(capsys, "8192,8192", "--kind", "layer", *on)["forward"]
    assert middle["tier"].startswith("block, registers")
    assert middle["threads"] > 32
    long = plan(capsys, "64,262144", "--kind", "layer", *on)["forward"]
    assert long["tier"].startswith("cluster")
    assert long["blocks"] > 1
    older = plan(capsys, "64,262144", "--kind", "layer", *on[2:], "--device-model", "A100")
    assert older["device"]["clusters"] is False
    assert not older["forward"]["tier"].startswith("cluster")
    assert older["forward"]["waves"] * older["forward"]["thread_groups"] >= 64


@without_kernels
def test_plan_says_where_no_kernel_serves_a_layers_memory_format(capsys):
    words = ("8x16x4x4", "--kind", "layer", "--memory-format", "channels_last")
    assert cli.main(["doctor", "--plan", *words]) == 2
    assert "the reference runs it" in capsys.readouterr().err
    assert plan(capsys, *words, "--no-noise")["forward"]["layout"] == "rows"


@without_kernels
def test_plan_knows_the_memory_format_and_the_device(capsys):
    last = plan(capsys, "256x256x14x14", "--memory-format", "channels_last")
    if not torch.cuda.is_available():
        assert last["device"]["name"] == "H200"
        assert "no GPU" in last["device"]["source"]
    assert last["forward"]["layout"] == last["backward"]["layout"] == "columns"
    assert plan(capsys, "256x256x14x14")["forward"]["layout"] == "rows"
    assert plan(capsys, "64,256")["forward"]["layout"] == "columns"
    small, large = (plan(capsys, "8,64,56,56", "--sms", n)["forward"] for n in ("16", "132"))
    assert small["thread_groups"] * small["blocks"] < large["thread_groups"] * large["blocks"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("64,3,8,8 --kind group --num-groups 2", "divisible by num_groups"),
        ("64,3 --kind layer --normalized-ndim 3", "normalized_ndim"),
        ("64 --kind batch", "wants an input of shape"),
        ("64,3 --num-groups 2", "num_groups belongs to kind 'group'"),
        ("64,3 --memory-format channels_last", "channels_last wants"),
        ("64,3 --sms 0", "--sms must be positive"),
    ],
)
def test_plan_refuses_what_no_layer_takes_with_and_without_kernels(
    words, sentence, capsys, monkeypatch
):
    for _ in range(2):
        assert cli.main(["doctor", "--plan", *words.split()]) == 2
        assert sentence in capsys.readouterr().err
        monkeypatch.setattr(cuda, "missing", lambda: "the CUDA kernels were not built: no nvcc")


def test_options_of_a_plan_are_refused_without_one(capsys):
    assert cli.main(["doctor", "--sms", "0", "--no-noise"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "options of --plan SHAPE, which was not given: --no-noise, --sms\n"


def test_plan_without_kernels_says_why(capsys, monkeypatch):
    monkeypatch.setattr(cuda, "missing", lambda: "the CUDA kernels were not built: no nvcc")
    assert cli.main(["doctor", "--plan", "64,3"]) == 1
    assert "no plan: the CUDA kernels were not built: no nvcc" in capsys.readouterr().err


def test_plan_wants_a_shape(capsys):
    for shape in ("big", "3,0", "", "64,,3", "64x"):
        with pytest.raises(SystemExit) as stop:
            cli.main(["doctor", "--plan", shape])
        assert stop.value.code == 2
        assert f"a shape is sizes of 1 or more, 256,64,56,56 or 256x64x56x56; got {shape!r}" in (
            capsys.readouterr().err
        )


def test_unknown_command_and_backend_exit_2(capsys):
    for arguments in (["dance"], ["gradcheck", "--backend", "abacus"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2
    assert "abacus" in capsys.readouterr().err


def test_python_m_normnorm_is_the_same_program():
    result = subprocess.run(
        [sys.executable, "-m", "normnorm", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == normnorm.__version__


# --- a program among others ---


@pytest.mark.parametrize(
    ("words", "unbuffered"), [(["--help"], ""), (["doctor", "--no-checks"], "1")]
)
def test_a_reader_that_has_enough_ends_the_command_quietly(words, unbuffered):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "normnorm", *words], stdout=write, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(write)
    assert (done.stderr, done.returncode) == ("", 141)


def test_a_full_disk_gets_a_sentence(monkeypatch, capsys):
    full = mock.Mock(wraps=sys.stdout)
    full.flush.side_effect = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(sys, "stdout", full)
    assert cli.main(["doctor", "--plan", "64,3", "--sms", "0"]) == 2
    assert capsys.readouterr().err.endswith("normnorm doctor: No space left on device\n")


@pytest.mark.usefixtures("no_checks")
def test_ctrl_c_gets_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr("normnorm.doctor.show_config", mock.Mock(side_effect=KeyboardInterrupt))
    assert cli.main(["doctor"]) == 130
    assert capsys.readouterr().err == "normnorm doctor: interrupted\n"
