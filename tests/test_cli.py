"""The command line: doctor and gradcheck say what is true, and fail when a kernel is wrong."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import normnorm
from normnorm import backends, cli, gradcheck, selfcheck


@pytest.fixture
def wrong_kernel(monkeypatch):
    """Puts a backend in the place of a real one whose backward is off by one part in a thousand."""
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    monkeypatch.setattr(backends, "_automatic", dict(backends._automatic))
    right = backends.get("reference")

    def backward(*arguments):
        grad_input, grad_weight, grad_bias = right.backward(*arguments)
        return grad_input * 1.001, grad_weight, grad_bias

    backends.register(
        backends.Backend("cpu", "cpu", right.forward, backward, right.infer, right.fold)
    )


def test_doctor_reports_versions_backends_and_passing_checks(capsys):
    assert cli.main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert report["environment"]["torch"] == torch.__version__
    assert report["backends"] == normnorm.available_backends()
    checked = {(check["layer"], check["backend"]) for check in report["checks"]}
    available = [name for name, why in report["backends"].items() if why is None]
    assert checked == {(case.layer, name) for case in selfcheck.CASES for name in available}


def test_doctor_in_words_names_every_backend(capsys):
    assert cli.main(["doctor"]) == 0
    text = capsys.readouterr().out
    for name, reason in normnorm.available_backends().items():
        assert name in text
        assert reason is None or reason in text
    assert " 0 missed" in text


def test_doctor_exits_1_on_a_wrong_kernel(wrong_kernel, capsys):
    assert cli.main(["doctor"]) == 1
    assert "MISS" in capsys.readouterr().out


def test_doctor_reports_a_kernel_that_raises(monkeypatch, capsys):
    def broken(*arguments):
        raise RuntimeError("this kernel is broken")

    monkeypatch.setattr(selfcheck, "worst_errors", broken)
    assert cli.main(["doctor"]) == 1
    assert "this kernel is broken" in capsys.readouterr().out


def test_gradcheck_passes_on_every_available_backend(capsys):
    assert cli.main(["gradcheck"]) == 0
    text = capsys.readouterr().out
    for case in selfcheck.CASES:
        assert case.layer in text
    assert " 0 missed" in text


def test_gradcheck_exits_1_on_a_wrong_kernel(wrong_kernel, capsys):
    assert cli.main(["gradcheck", "--backend", "cpu"]) == 1
    assert "MISS" in capsys.readouterr().out


@pytest.mark.parametrize("wrong", ["output", "running"])
def test_a_wrong_forward_or_fold_is_seen_too(wrong, monkeypatch):
    monkeypatch.setattr(backends, "_backends", dict(backends._backends))
    monkeypatch.setattr(backends, "_automatic", dict(backends._automatic))
    right = backends.get("reference")

    def forward(*arguments):
        output, stats = right.forward(*arguments)
        return output + 1e-3, stats

    def fold(stats, *arguments):
        return right.fold(stats * 1.01, *arguments)

    backends.register(
        backends.Backend(
            "cpu",
            "cpu",
            forward if wrong == "output" else right.forward,
            right.backward,
            right.infer,
            fold if wrong == "running" else right.fold,
        )
    )
    rows = gradcheck.table("cpu")
    batch = [row for row in rows if row["layer"].startswith("Batch") and row["mode"] == "training"]
    assert all(not row["passed"] for row in batch if row["dtype"] in ("float64", "float32"))


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
