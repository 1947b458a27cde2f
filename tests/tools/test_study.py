"""The study of the digits: its statistics, its growth run by run, its page."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats

from normnorm import cli
from normnorm.experiments.libraries import ExperimentError
from normnorm.experiments.norms import make_norm
from normnorm.experiments.study import design, page, results

ROOT = Path(__file__).resolve().parents[2]
STORED = ROOT / "benchmarks/results/study_digits.json"


def _study(**accuracies: list[float]) -> results.Study:
    study = results.Study.new()
    for name, values in accuracies.items():
        runs = [{"seed": seed, "accuracy": value} for seed, value in enumerate(values)]
        study.arms[name] = {"experiment": {}, "tuning": None, "runs": runs}
    return study


def test_differences_are_paired_by_seed() -> None:
    random = np.random.default_rng(0)
    plain = random.normal(90, 5, 10)
    normal = plain + random.normal(1, 0.5, 10)
    study = _study(a=list(normal), b=list(plain))
    study.arms["a"]["runs"].reverse()  # the order of the runs does not matter
    found = results.difference(study, "a", "b", "accuracy")
    assert found is not None
    assert found.mean == pytest.approx((normal - plain).mean())
    assert found.p == pytest.approx(scipy.stats.ttest_1samp(normal - plain, 0).pvalue)
    half = scipy.stats.t.ppf(0.975, 9) * scipy.stats.sem(normal - plain)
    assert (found.low, found.high) == pytest.approx((found.mean - half, found.mean + half))
    assert found.pairs == 10
    assert found.p < 1e-3 < scipy.stats.ttest_ind(normal, plain).pvalue


def test_differences_that_cannot_be_had() -> None:
    study = _study(a=[1.0, 2.0], b=[1.0, 2.0], c=[5.0])
    same = results.difference(study, "a", "b", "accuracy")
    assert same is not None
    assert (same.mean, same.p) == (0.0, 1.0)
    assert results.difference(study, "a", "c", "accuracy") is None
    assert results.difference(study, "a", "missing", "accuracy") is None


def test_adjusted_p_values_are_of_benjamini_and_hochberg() -> None:
    assert results.adjusted([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.04, 0.04])
    assert results.adjusted([]) == []


def test_every_arm_that_is_compared_exists_and_can_be_built() -> None:
    arms = {arm.name: arm for arm in design.arms(20)}
    for comparison in design.comparisons():
        assert comparison.arm in arms
        assert comparison.against in arms
    for arm in arms.values():
        arm.experiment.check()
    noise = arms["batch + noise"].experiment
    layer = make_norm(noise.norm, False, alpha=noise.alpha, noise_train=noise.noise_train)(4)
    assert (layer.alpha, layer.noise_train) == (0.0, 0.4)
    transform = arms["layer + transform"].experiment
    layer = make_norm(transform.norm, True, noise_train=transform.noise_train)(4)
    assert (layer.alpha, layer.noise_train) == (1.0, 0.0)
    assert len(design.SEEDS) >= 10
    assert not set(design.SEEDS) & set(design.TUNING_SEEDS)


def test_a_study_grows_run_by_run_and_is_not_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, there = tmp_path / "study.json", tmp_path / "docs"
    words = ["study", "--results", str(path), "--epochs", "1", "--arms", "batch", "batch + both"]
    assert cli.main([*words, "--seeds", "1"]) == 0
    first = json.loads(path.read_text())
    there.mkdir()
    assert cli.main([*words, "--seeds", "2", "--page", str(there / "results.md")]) == 0
    second = json.loads(path.read_text())
    for name, arm in second["arms"].items():
        assert [run["seed"] for run in arm["runs"]] == [2, 3]
        assert arm["runs"][0] == first["arms"][name]["runs"][0]
        for run in arm["runs"]:
            assert 0 < run["accuracy"] <= 100
            assert all(math.isfinite(value) for value in run.values())
    text = (there / "results.md").read_text()
    assert "| batch + both | batch" in text
    assert matplotlib.image.imread(there / "images/results.png").std() > 0.05
    with_other_epochs = ["study", "--results", str(path), "--epochs", "2",
                         "--arms", "group", "batch"]  # fmt: skip
    assert cli.main(with_other_epochs) == 2  # before the arm that is new
    assert "holds 'batch' with other settings" in capsys.readouterr().err
    assert json.loads(path.read_text()) == second


def test_the_words_of_the_page_follow_the_numbers(tmp_path: Path) -> None:
    study = results.Study.new()
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
            study.arms[arm] = {"experiment": experiment, "tuning": None, "runs": runs}
    page.write(study, tmp_path / "page.md", tmp_path / "images/page.png")
    text = (tmp_path / "page.md").read_text()
    assert re.search(r"the better in 1: batch \+ both \(\+[12]\.\d\d points\)", text)
    assert re.search(r"for the worse in 1: layer \+ both \(-[12]\.\d\d points\)", text)
    assert "In 1 no difference can be told" in text
    assert re.search(r"It ran 10 seeds an arm: .* ±0\.\d\d points", text.replace("\n", " "))
    for arm in study.arms.values():
        del arm["runs"][1:]
    page.write(study, tmp_path / "page.md", tmp_path / "images/page.png")
    text = (tmp_path / "page.md").read_text()
    assert "It ran 1 seed an arm, too few to tell any difference from chance." in text


@pytest.mark.parametrize("content", ["", "{}", '{"format": "normnorm study 1"}', "[1]"])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, content: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ExperimentError, match="is not a study's result"):
        results.Study.load(path)
    assert cli.main(["study", "--results", str(path)]) == 2
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
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    path = tmp_path / "study.json"
    assert cli.main(["study", "--results", str(path), *words]) == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not path.exists()


def test_the_stored_study_is_whole_and_its_page_is_not_stale(tmp_path: Path) -> None:
    study = results.Study.load(STORED)
    assert set(study.arms) == {arm.name for arm in design.arms(20)}
    assert all(study.seeds(name) == set(design.SEEDS) for name in study.arms)
    assert all(arm["experiment"]["epochs"] >= 20 for arm in study.arms.values())
    page.write(study, tmp_path / "results.md", tmp_path / "images/results.png")
    assert (tmp_path / "results.md").read_text() == (ROOT / "docs/measured/results.md").read_text()
