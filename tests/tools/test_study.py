"""The study of the digits: its statistics, its growth run by run, its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from unittest import mock

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from accuracy import study
from accuracy.norms import make_norm
from accuracy.study import Study, difference
from accuracy.study_page import write
from accuracy.trainer import Trainer

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks/results/study_digits.json"


def of_accuracies(**accuracies):
    found = Study()
    for name, values in accuracies.items():
        runs = [{"seed": seed, "accuracy": value} for seed, value in enumerate(values)]
        found.arms[name] = {"experiment": {}, "tuning": None, "runs": runs}
    return found


def test_differences_are_paired_by_seed():
    random = np.random.default_rng(0)
    plain = random.normal(90, 5, 10)
    normal = plain + random.normal(1, 0.5, 10)
    results = of_accuracies(a=normal, b=plain)
    results.arms["a"]["runs"].reverse()  # the order of the runs does not matter
    found = difference(results, "a", "b", "accuracy")
    paired = scipy.stats.ttest_rel(normal, plain)
    low, high = paired.confidence_interval()
    assert found == pytest.approx(((normal - plain).mean(), low, high, paired.pvalue))
    assert found.p < 1e-3 < scipy.stats.ttest_ind(normal, plain).pvalue


def test_differences_that_cannot_be_had():
    results = of_accuracies(a=[1.0, 2.0], b=[1.0, 2.0], c=[5.0])
    assert difference(results, "a", "b", "accuracy") == (0.0, 0.0, 0.0, 1.0)
    assert difference(results, "a", "c", "accuracy") is None
    assert difference(results, "a", "missing", "accuracy") is None


def test_every_arm_that_is_compared_exists_and_can_be_built():
    arms = study.arms(20)
    assert {name for pair in study.COMPARISONS for name in pair} <= set(arms)
    for arm in arms.values():
        arm.check()
    noise, transform = arms["batch + noise"], arms["layer + transform"]
    layer = make_norm(noise.norm, False, alpha=noise.alpha, noise_train=noise.noise_train)(4)
    assert (layer.alpha, layer.noise_train) == (0.0, 0.4)
    layer = make_norm(transform.norm, True, noise_train=transform.noise_train)(4)
    assert (layer.alpha, layer.noise_train) == (1.0, 0.0)
    assert not set(study.SEEDS) & set(study.TUNING_SEEDS)


def test_a_study_grows_run_by_run_and_is_not_repeated(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "TUNING_SEEDS", (101,))
    monkeypatch.setattr(study, "TUNING_RATES", (1e-9, 0.1))
    path, there = tmp_path / "study.json", tmp_path / "docs"
    arms = ["batch", "strong batch", "decorrelated + both", "decorrelated"]
    words = ["--results", str(path), "--epochs", "1", "--arms", *arms]
    assert study.main([*words, "--seeds", "1"]) == 0
    first = json.loads(path.read_text())
    there.mkdir()
    assert study.main([*words, "--seeds", "2", "--page", str(there / "results.md")]) == 0
    second = json.loads(path.read_text())
    for name, arm in second["arms"].items():
        assert [run["seed"] for run in arm["runs"]] == [2, 3]
        assert arm["runs"][0] == first["arms"][name]["runs"][0]
        assert arm["experiment"]["learning_rate"] == 0.1
        for run in arm["runs"]:
            assert 0 < run["accuracy"] <= 100
            assert all(math.isfinite(value) for value in run.values())
    assert list(second["arms"]["strong batch"]["tuning"]) == ["1e-09", "0.1"]
    text = (there / "results.md").read_text()
    assert "| decorrelated + both | decorrelated" in text
    assert matplotlib.image.imread(there / "images/results.png").std() > 0.05
    with monkeypatch.context() as during:
        during.setattr(Trainer, "_train_step", mock.Mock(side_effect=KeyboardInterrupt))
        assert study.main(["--results", str(tmp_path / "none.json"), "--arms", "batch"]) == 130
    assert "interrupted; the same command goes on with the runs" in capsys.readouterr().err
    other = ["--results", str(path), "--epochs", "2", "--arms", "group", "batch"]
    assert study.main(other) == 2  # before the arm that is new
    assert "study.py: " in (sentence := capsys.readouterr().err)
    assert "holds 'batch' with other settings" in sentence
    assert json.loads(path.read_text()) == second


def test_the_words_of_the_page_follow_the_numbers(tmp_path):
    results = Study()
    gains = {"batch": 2.0, "layer": -2.0, "group": 0.0}
    for name, gain in gains.items():
        for arm, shift in ((name, 0.0), (f"{name} + both", gain)):
            runs = [
                {"seed": seed, "noisy_accuracy": 50.0, "change": None, "qq_r2": None,
                 "joint_distance": None, "correlation": None, "mutual_information": None,
                 "step_ms": 1.0, "accuracy": 90 + shift + math.sin(7 * seed + len(arm)) / 5}
                for seed in range(10)
            ]  # fmt: skip
            experiment = {"epochs": 20, "step_epochs": 6, "learning_rate": 0.1}
            results.arms[arm] = {"experiment": experiment, "tuning": None, "runs": runs}
    write(results, tmp_path / "page.md", tmp_path / "images/page.png")
    text = (tmp_path / "page.md").read_text()
    assert re.search(r"the better in 1: batch \+ both \(\+[12]\.\d\d points\)", text)
    assert re.search(r"for the worse in 1: layer \+ both \(-[12]\.\d\d points\)", text)
    assert "In 1 no difference can be told" in text
    assert re.search(r"It ran 10 seeds an arm: .* ±0\.\d\d points", text.replace("\n", " "))
    for arm in results.arms.values():
        del arm["runs"][1:]
    write(results, tmp_path / "page.md", tmp_path / "images/page.png")
    text = (tmp_path / "page.md").read_text()
    assert "It ran 1 seed an arm, too few to tell any difference from chance." in text


@pytest.mark.parametrize("content", ["", "{}", '{"format": "normnorm study 1"}', "[1]"])
def test_a_foreign_file_is_refused_and_kept(tmp_path, capsys, content):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert study.main(["--results", str(path)]) == 2
    assert "is not a study's result" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--seeds", "0"], "seeds must be 1 to 10; got 0"),
        (["--seeds", "11"], "seeds must be 1 to 10; got 11"),
        (["--epochs", "0"], "epochs must be positive"),
        (["--arms", "batch", "rms"], "arms must be among batch, .*; got rms"),
        (["--no-training"], "is not a study's result"),
        (["--page", "/nonexistent/page.md"], "--page /nonexistent/page.md: there is no folder"),
    ],
)
def test_bad_arguments_get_a_sentence(tmp_path, capsys, words, sentence):
    path = tmp_path / "study.json"
    assert study.main(["--results", str(path), *words]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not path.exists()


def test_the_stored_study_is_whole_and_its_page_is_not_stale(tmp_path):
    results = Study.load(STORED)
    assert set(results.arms) == set(study.arms(20))
    assert all(set(results.by_seed(arm, "accuracy")) == set(study.SEEDS) for arm in results.arms)
    study._check(results, study.arms(20), STORED)  # with the settings of today
    write(results, tmp_path / "results.md", tmp_path / "images/results.png")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/measured/results.md").read_text()
