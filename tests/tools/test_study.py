"""The study: its plan, its statistics, its growth block by block, its page."""

import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import scipy.stats
from scipy.stats import nct
from statsmodels.stats.multitest import multipletests

from accuracy import plan, study
from accuracy.experiment import Experiment
from accuracy.runs import folder_name
from accuracy.study import Study, confirmation_jobs, merged_facts, tuning_jobs
from accuracy.study_page import CLAIMS, NAMES, detectable, difference, findings, write


def test_every_run_of_the_plan_can_be_carried_out() -> None:
    for question in (*plan.FULL.values(), *plan.QUICK.values()):
        assert bool(question.tuning) != bool(question.grid)
        for arm in question.arms:
            assert sum(run.copies for run in question.test_runs(arm, {})) == question.seeds
            for setting in question.settings():
                runs = list(question.test_runs(arm, setting))
                if question.tuning:
                    runs.append(question.tuning_run(arm, setting))
                for run in runs:
                    run.check()
                    assert run.batch_size <= (run.limit or 500)


def test_a_seed_serves_tuning_testing_or_replication() -> None:
    question = plan.FULL[plan.PRIMARY]
    runs = [
        [question.tuning_run("both", {})],
        list(question.test_runs("both", {})),
        list(question.test_runs("both", {}, plan.REPLICATION_SEED)),
    ]
    assert [run.validation for part in runs for run in part] == [True] + [False] * 4
    seeds = [{run.seed + i for run in part for i in range(run.copies)} for part in runs]
    assert [len(part) for part in seeds] == [5, 20, 20]
    assert len(set().union(*seeds)) == 45


def filled(questions: dict[str, plan.Question], of: Callable[[Experiment], float]) -> Study:
    """A study of every run, with ``of(experiment)`` and a part by seed as each measure."""
    found = Study(environment={"torch": "2"})

    def fill(experiment: Experiment) -> None:
        seeds = range(experiment.seed, experiment.seed + experiment.copies)
        numbers = [of(experiment) + np.sin(7.0 * seed + of(experiment)) / 5 for seed in seeds]
        found.runs[folder_name(experiment)] = {
            "experiment": experiment.to_dict(), **dict.fromkeys(NAMES, numbers)
        }  # fmt: skip

    for experiment, _ in tuning_jobs(questions.values()):
        fill(experiment)
    for experiment, _ in confirmation_jobs(found, questions):
        fill(experiment)
    return found


def test_differences_are_paired_and_adjusted_together() -> None:
    random = np.random.default_rng(0)
    plain = random.normal(90, 5, 10)
    normal = plain + random.normal(1, 0.5, 10)
    found = difference(normal, plain)
    paired = scipy.stats.ttest_rel(normal, plain)
    low, high = paired.confidence_interval()
    assert found[:4] == pytest.approx(((normal - plain).mean(), low, high, paired.pvalue))
    assert difference([1.0, 2.0], [1.0, 2.0])[:4] == (0.0, 0.0, 0.0, 1.0)
    assert difference([1.0], [2.0]) is None

    every = findings(filled(plan.FULL, lambda e: 90 + (e.norm != "batch")), plan.FULL)
    assert list(every) == plan.contrasts(plan.FULL)
    raw = [finding.difference.p for finding in every.values()]
    holm = multipletests(raw, method="holm")[1]
    assert [finding.adjusted for finding in every.values()] == pytest.approx(holm)


def test_comparisons_without_runs_count_with_p_1(tmp_path: Path) -> None:
    whole = filled(plan.FULL, lambda e: 90 + (e.norm != "batch"))
    part = Study(environment={})
    part.runs = {
        name: run for name, run in whole.runs.items() if run["experiment"]["dataset"] == "mnist1d"
    }
    every = findings(whole, plan.FULL)
    found = findings(part, plan.FULL)
    assert 0 < len(found) < len(every)
    assert all(finding.adjusted >= every[contrast].adjusted for contrast, finding in found.items())
    write(part, plan.FULL, tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Runs are missing for: batch normalization, 500 images. In the adjustment" in text


def test_the_detectable_difference_has_the_stated_power() -> None:
    found = difference(list(np.arange(20.0)), [0.0] * 20)
    effect = detectable(found, 100) / found.deviation
    edge = scipy.stats.t.ppf(1 - 0.05 / 100 / 2, 19)
    power = nct.sf(edge, 19, effect * 20**0.5) + nct.cdf(-edge, 19, effect * 20**0.5)
    assert power == pytest.approx(0.8, abs=1e-3)


def test_every_arm_is_tested_with_its_own_best_setting() -> None:
    def accuracy(experiment: Experiment) -> float:
        best = 1e-2 if experiment.norm == "batch" else 2e-3
        return 90.0 - 10 * abs(experiment.weight_decay - best)

    question = plan.FULL[plan.PRIMARY]
    found = filled({plan.PRIMARY: question}, accuracy)
    for arm, decay in (("plain", 1e-2), ("both", 2e-3)):
        assert found.chosen(question, arm) == {"weight_decay": decay}
        runs = [*found.test_runs(question, arm, "tuned"), *found.replication(question, arm)]
        assert {run.weight_decay for run in runs} == {decay}
        assert {run.weight_decay for run in found.test_runs(question, arm, "paper")} == {5e-4}
    assert Study().test_runs(question, "both", "tuned") is None


def test_the_words_of_the_page_follow_the_numbers(tmp_path: Path) -> None:
    def accuracy(experiment: Experiment) -> float:
        gain = 2.0 if experiment.norm == "batchnormal" else -2.0
        return 90.0 + gain * ("normal" in experiment.norm) * (experiment.weight_decay == 5e-4)

    page = tmp_path / "page.md"
    write(filled(plan.FULL, accuracy), plan.FULL, page)
    text = page.read_text()
    assert text.startswith("# Against batch normalization: more accurate at the paper's settings, ")
    every = findings(filled(plan.FULL, accuracy), plan.FULL).values()
    more, less = (sum(f.sign == sign for f in every) for sign in (1, -1))
    counts = rf"of {len(every)}, .* larger measure in {more} and a smaller one in {less}; "
    assert re.search(counts, text.replace("\n ", ""))
    assert min(more, less) > 0
    assert re.search(r"\| 4,000 signals, the paper's settings +\| \+1\.9.*\| larger ", text)
    assert re.search(r"\| both, paper +\| accuracy +\| -2\.0.*\| < 0\.001 ", text)
    assert re.search(r"\| group norm, tuned +\| \+0\.00 .*\| not significant ", text)
    assert re.search(r"\| both +\| 9.*\| weight_decay 0.0005 \(smallest\) +\|", text)
    assert "near chance" not in text
    assert re.search(r"first seeds +\| 20 +\|", text)
    assert re.search(r"together +\| 40 +\|", text)
    assert matplotlib.image.imread(tmp_path / "images/page.png").std() > 0.05
    write(Study(environment={}), plan.FULL, page)
    assert "Not measured yet." in page.read_text()


def test_the_table_of_claims_names_comparisons_of_the_plan() -> None:
    planned = {contrast[:3] for contrast in plan.contrasts(plan.FULL)}
    for comparisons in CLAIMS.values():
        assert {comparison[:3] for comparison in comparisons} <= planned


def test_runs_near_chance_are_counted(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write(filled(plan.FULL, lambda e: 10.0 if e.batch_size == 8 else 90.0), plan.FULL, page)
    counted = "below 20 %, near chance (10 %): batch_size 8, weight_decay 0.0005: plain 10, "
    assert counted in page.read_text().replace("\n", " ")


def test_the_stored_page_is_that_of_the_stored_results(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    write(Study.load(root / "benchmarks/results/study.json"), plan.FULL, tmp_path / "results.md")
    stored = (root / "docs/measured/results.md").read_text()
    assert stored == (tmp_path / "results.md").read_text()
    _, said, _ = re.split("\n## (?:Accuracy|Performance)\n", (root / "README.md").read_text())
    numbers = re.findall(r"[-+]\d+\.\d+", said)
    assert len(numbers) > 10
    assert [number for number in numbers if number not in stored] == []


def test_a_study_grows_block_by_block_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "study.json"
    words = ["--quick", "--results", str(path), "--data-dir", str(tmp_path), "--processes", "1"]
    chosen = plan.QUICK["images"]
    few = {name: chosen.arms[name] for name in ("plain", "both")}
    tiny = plan.replace(chosen, arms=few, tuning={"weight_decay": (5e-4, 1e-2)})
    monkeypatch.setattr(plan, "QUICK", {"images": tiny})
    assert study.main(words) == 0
    first = json.loads(path.read_text())
    assert len(first["runs"]) == 2 * 2 + 2 * 2 - 1 or len(first["runs"]) <= 8
    lost = next(name for name in first["runs"] if "validation" in name)
    del first["runs"][lost]
    path.write_text(json.dumps(first))
    assert study.main(words) == 0
    second = json.loads(path.read_text())
    assert lost in second["runs"]
    assert all(second["runs"][name] == run for name, run in first["runs"].items())
    for run in second["runs"].values():
        assert len(run["accuracy"]) == 2
        assert all(0 < value <= 100 for value in run["accuracy"] + run["train_accuracy"])


@pytest.mark.slow
def test_the_quick_study_answers_every_question(tmp_path: Path) -> None:
    path, page = tmp_path / "study.json", tmp_path / "page.md"
    words = ["--quick", "--results", str(path), "--page", str(page), "--data-dir", str(tmp_path)]
    assert study.main(words) == 0
    found = Study.load(path)
    tuning, testing = tuning_jobs(plan.QUICK.values()), confirmation_jobs(found, plan.QUICK)
    for experiment, kinds in (*tuning, *testing):
        for name in ("accuracy", *(name for kind in kinds for name in plan.MEASURES[kind])):
            numbers = found.measured([experiment], name)
            assert len(numbers) == experiment.copies
            assert np.isfinite(numbers).all()
    text = page.read_text()
    assert all(question.title in text for question in plan.QUICK.values())
    assert "Not measured yet." not in text
    assert matplotlib.image.imread(tmp_path / "images/page.png").std() > 0.05


def test_the_page_names_every_commit_that_made_runs():
    first = merged_facts({"commit": "a", "torch": "2"}, {"commit": "b", "torch": "2"})
    assert first == {"commit": "a, b", "torch": "2"}
    assert merged_facts(first, {"commit": "b", "torch": "2"}) == first


def test_a_run_that_questions_share_has_the_measures_of_all(tmp_path, monkeypatch):
    def measure(experiment, _, kinds):
        names = [name for kind in kinds for name in plan.MEASURES[kind]]
        numbers = dict.fromkeys(["accuracy", *names], [1.0] * experiment.copies)
        return {"experiment": experiment.to_dict(), **numbers}

    monkeypatch.setattr(study, "measure", measure)
    monkeypatch.setattr(study, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    found = Study(environment={})
    for names in (["size"], ["conv-1000", "batch-size"]):
        questions = {name: plan.QUICK[name] for name in names}
        for jobs in (tuning_jobs(questions.values()), confirmation_jobs(found, questions)):
            study.train(found, tmp_path / "study.json", "all", list(jobs), tmp_path, 1)
    question = plan.QUICK["conv-1000"]
    for arm in question.arms:
        for measure_name in (*plan.MEASURES["robustness"], *plan.MEASURES["layers"]):
            (run,) = found.test_runs(question, arm, "paper")
            assert found.measured([run], measure_name) == [1.0, 1.0]


@pytest.mark.parametrize("content", ["", "{}", '{"format": "normnorm study 2"}', "[1]"])
def test_a_foreign_file_is_refused_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    path = tmp_path / "other.json"
    path.write_text(content)
    assert study.main(["--results", str(path)]) == 2
    assert "is not a study's result" in capsys.readouterr().err
    assert path.read_text() == content


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--questions", "images", "sounds"], "invalid choice: 'sounds' .choose from '?conv-4000"),
        (["--no-training"], "is not a study's result"),
        (["--page", "/nonexistent/page.md"], "--page /nonexistent/page.md: there is no folder"),
    ],
)
def test_bad_arguments_get_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    path = tmp_path / "study.json"
    try:
        status = study.main(["--results", str(path), *words])
    except SystemExit as stop:  # argparse's own
        status = stop.code
    assert status == 2
    assert re.search(sentence, capsys.readouterr().err)
    assert not path.exists()
