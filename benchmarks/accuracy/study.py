"""Running the study: the experiments of :mod:`accuracy.plan` in a file of results that grows by one
block of seeds at a time."""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from tqdm import tqdm

import normnorm.environment
from accuracy import measures, plan
from accuracy.experiment import Experiment
from accuracy.plan import Question
from accuracy.runs import folder_name
from accuracy.trainer import Trainer, World, load_data
from commands import check_folder, check_output
from normnorm.cli import CommandError, execute
from speed.results import write_atomically

FORMAT = "normnorm study 2"


@dataclass
class Study:
    """All that a study has measured so far.

    Attributes:
        environment: of the machine that ran it.
        runs: by :func:`accuracy.runs.folder_name` of an experiment, its ``experiment`` and a list
            of numbers, one a seed, for every measure.
    """

    environment: dict[str, Any] = field(default_factory=normnorm.environment.facts)
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Study:
        """Reads what :meth:`save` wrote.

        Raises:
            CommandError: the file is not a study's.
        """
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            study = cls(content["environment"], content["runs"])
            for run in study.runs.values():
                Experiment(**run["experiment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{path} is not a study's result ({FORMAT}): {error}") from None
        return study

    def save(self, path: Path) -> None:
        """Writes the file in one step: a kill leaves it as it was."""
        content = {"format": FORMAT, "environment": self.environment, "runs": self.runs}
        write_atomically(path, json.dumps(content, indent=1) + "\n")

    def measured(self, experiments: Iterable[Experiment], measure: str) -> list[float]:
        """One number a seed, over blocks of seeds; empty if a block is missing or lacks it."""
        found: list[float] = []
        for experiment in experiments:
            numbers = self.runs.get(folder_name(experiment), {}).get(measure)
            if numbers is None:
                return []
            found += numbers
        return found

    def chosen(self, question: Question, arm: str) -> dict[str, Any] | None:
        """The setting of an arm's best mean accuracy on the validation sets, the first of equal
        ones; None before all have been tried."""
        scores = [
            self.measured([question.tuning_run(arm, setting)], "accuracy")
            for setting in question.settings()
        ]
        if not all(scores):
            return None
        best = max(range(len(scores)), key=lambda i: mean(scores[i]))
        return question.settings()[best]

    def test_runs(self, question: Question, arm: str, setting: str) -> list[Experiment] | None:
        """The blocks of an arm in a setting ("paper", "tuned", a grid's words); None for "tuned"
        before the tuning."""
        values: dict[str, Any] | None
        if setting == "paper":
            values = {}
        elif setting == "tuned":
            values = self.chosen(question, arm)
        else:
            values = next(v for v in question.settings() if plan.words(v) == setting)
        return None if values is None else list(question.test_runs(arm, values))

    def replication(self, question: Question, arm: str) -> list[Experiment]:
        """An arm's blocks, tuned, on the replication's seeds; none before the tuning."""
        values = self.chosen(question, arm)
        return list(question.test_runs(arm, values, plan.REPLICATION_SEED)) if values else []


def measure(experiment: Experiment, directory: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """Trains an experiment on one thread; its numbers, one a seed:

    * ``accuracy``, ``loss``: of the test images (of the validation images for such an experiment);
    * ``train_accuracy``: of the last epoch's steps;
    * for "robustness" and "layers" in ``kinds`` those of :func:`accuracy.measures.robustness` and
      :func:`accuracy.measures.of_layers`.
    """
    torch.set_num_threads(1)
    world = World(0, 1, torch.device("cpu"))
    trainer = Trainer(experiment, load_data(experiment, directory), world)
    last = trainer.train()[-1]
    found: dict[str, Any] = {
        "experiment": experiment.to_dict(),
        "accuracy": last.test_accuracy,
        "loss": last.test_loss,
        "train_accuracy": last.train_accuracy,
    }
    if "robustness" in kinds:
        found |= measures.robustness(trainer)
    if "layers" in kinds:
        found |= measures.of_layers(trainer)
    return found


# An experiment and the kinds of measures that it is asked for.
Job = tuple[Experiment, tuple[str, ...]]


def tuning_jobs(questions: Iterable[Question]) -> Iterator[Job]:
    for question in questions:
        for arm in question.arms if question.tuning else ():
            for setting in question.settings():
                yield question.tuning_run(arm, setting), ()


def confirmation_jobs(study: Study, questions: dict[str, Question]) -> Iterator[Job]:
    for name, question in questions.items():
        settings = ["paper", "tuned"]
        if not question.tuning:
            settings = [plan.words(setting) for setting in question.settings()]
        for arm, setting in itertools.product(question.arms, settings):
            for number, run in enumerate(study.test_runs(question, arm, setting) or ()):
                kinds = (kind for kind in question.measures if kind != "layers" or number == 0)
                yield run, tuple(kinds)
        if name == plan.PRIMARY:
            for arm in ("plain", "both"):
                yield from ((run, ()) for run in study.replication(question, arm))


def merged_facts(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The facts of all commits and machines that made a study's runs, separated by commas."""
    return {
        key: f"{before[key]}, {value}"
        if key in before and str(value) not in str(before[key]).split(", ")
        else before.get(key, value)
        for key, value in now.items()
    }


def train(
    study: Study,
    path: Path,
    title: str,
    jobs: Iterable[Job],
    directory: Path,
    processes: int,
) -> None:
    """Runs the experiments that the study lacks, or lacks measures of, several at a time, and saves
    after each."""
    # Questions share runs, and may want different measures of them.
    wanted: dict[str, tuple[Experiment, tuple[str, ...]]] = {}
    for experiment, kinds in jobs:
        _, before = wanted.get(folder_name(experiment), (experiment, ()))
        wanted[folder_name(experiment)] = experiment, tuple(sorted({*before, *kinds}))
    missing = {
        name: (experiment, kinds)
        for name, (experiment, kinds) in wanted.items()
        if not {"accuracy", *(m for kind in kinds for m in plan.MEASURES[kind])}
        <= study.runs.get(name, {}).keys()
    }
    if missing:
        study.environment = merged_facts(study.environment, normnorm.environment.facts())
    context = multiprocessing.get_context("spawn")
    with (
        tqdm(total=len(missing), unit="block", desc=title) as bar,
        ProcessPoolExecutor(processes, context) as pool,
    ):
        futures = {
            pool.submit(measure, experiment, directory, kinds): name
            for name, (experiment, kinds) in missing.items()
        }
        try:
            for future in as_completed(futures):
                study.runs[futures[future]] = future.result()
                study.save(path)
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _run(args: argparse.Namespace) -> int:
    from accuracy.study_page import write

    every = plan.QUICK if args.quick else plan.FULL
    path, page = args.results, args.page
    check_folder(path.parent)
    if path.is_dir():
        check_output("--results", path)
    if page:
        check_output("--page", page)
        check_folder(page.parent / "images")
    study = Study.load(path) if path.exists() or args.no_training else Study()
    chosen = {name: every[name] for name in args.questions or every}
    if not args.no_training:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            how = args.data_dir, args.processes
            train(study, path, "tuning", tuning_jobs(chosen.values()), *how)
            train(study, path, "testing", confirmation_jobs(study, chosen), *how)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command goes on with the runs that {path} lacks"
            ) from None
    if page:
        write(study, every, page)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the runs that the results lack and writes the page; the exit status."""
    parser = argparse.ArgumentParser(
        prog="study.py",
        description="Runs the study of normality normalization on small data sets "
        "(docs/measured/experiments.md) and writes its page. Blocks of seeds that the results hold "
        "already are not repeated, so that a killed study goes on.",
    )
    parser.add_argument("--results", type=Path, default=Path("runs/study.json"))
    parser.add_argument("--questions", nargs="+", choices=plan.FULL, metavar="NAME", help="(all)")
    parser.add_argument("--quick", action="store_true", help="two seeds, a few steps each")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="of drawn data (data)")
    parser.add_argument("--processes", type=int, default=2, help="of one thread each (2)")
    parser.add_argument("--page", type=Path, help="where the page is written; else none is")
    parser.add_argument("--no-training", action="store_true", help="the page of what is there")
    parser.set_defaults(run=_run, extra="accuracy")
    return execute(parser, arguments)
