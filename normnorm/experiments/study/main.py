"""``normnorm study``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``normnorm study`` takes."""
    parser.description = (
        "Trains every norm with and without noise and transform on handwritten digits, over "
        "several seeds, and writes a page of results. Runs that the results hold already are not "
        "repeated, so that a killed study goes on."
    )
    parser.add_argument("--results", type=Path, default=Path("runs/study.json"))
    parser.add_argument("--seeds", type=int, default=10, help="how many, at most 10 (10)")
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--arms", nargs="+", help="by name; all by default")
    parser.add_argument("--page", type=Path, help="where the page is written; else none is")
    parser.add_argument("--no-training", action="store_true", help="the page of what is there")


def run(arguments: argparse.Namespace) -> int:
    """Trains and writes; 0.

    Raises:
        CommandError: something cannot be done, which is said before anything is trained.
        KeyboardInterrupt: with what goes on from there.
    """
    from normnorm.commands import check_folder, check_output
    from normnorm.experiments.libraries import ExperimentError
    from normnorm.experiments.study.design import SEEDS, arms
    from normnorm.experiments.study.page import write
    from normnorm.experiments.study.results import Study

    if not 1 <= arguments.seeds <= len(SEEDS):
        raise ExperimentError(f"seeds must be 1 to {len(SEEDS)}; got {arguments.seeds}")
    if arguments.epochs < 1:
        raise ExperimentError(f"epochs must be positive; got {arguments.epochs}")
    chosen = arms(arguments.epochs)
    names = [arm.name for arm in chosen]
    unknown = [name for name in arguments.arms or [] if name not in names]
    if unknown:
        raise ExperimentError(f"arms must be among {', '.join(names)}; got {', '.join(unknown)}")
    if arguments.arms:
        chosen = [arm for arm in chosen if arm.name in arguments.arms]
    check_folder(arguments.results.parent)
    if arguments.results.is_dir():
        check_output("--results", arguments.results)
    page = arguments.page
    image = page and page.parent / "images" / f"{page.stem}.png"
    if page:
        check_output("--page", page)
        check_folder(image.parent)
    there = arguments.results.exists()
    study = Study.load(arguments.results) if there or arguments.no_training else Study.new()
    if not arguments.no_training:
        _check(study, chosen, arguments.results)
        try:
            _train(study, chosen, SEEDS[: arguments.seeds], arguments.results)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command goes on with the runs that {arguments.results} lacks"
            ) from None
    if page:
        write(study, page, image)
    return 0


def _settings(arm: Any, kept: dict[str, Any] | None) -> Any:
    """An arm's experiment, with the learning rate that was chosen for it."""
    if kept is None or not arm.tuned:
        return arm.experiment
    return replace(arm.experiment, learning_rate=kept["experiment"]["learning_rate"])


def _without_seed(experiment: Any) -> dict[str, Any]:
    setting: dict[str, Any] = experiment.to_dict()
    del setting["seed"]
    return setting


def _check(study: Any, chosen: list[Any], path: Path) -> None:
    from normnorm.experiments.libraries import ExperimentError

    kept = {arm.name: study.arms.get(arm.name) for arm in chosen}
    other = [
        f"'{arm.name}'"
        for arm in chosen
        if kept[arm.name] is not None
        and _without_seed(_settings(arm, kept[arm.name])) != kept[arm.name]["experiment"]
    ]
    if other:
        raise ExperimentError(
            f"{path} holds {', '.join(other)} with other settings; name another --results"
        )


def _train(study: Any, chosen: list[Any], seeds: tuple[int, ...], path: Path) -> None:
    from tqdm import tqdm

    from normnorm.experiments.study.measure import measure, tune
    from normnorm.experiments.world import joined

    with joined("cpu") as world, tqdm(total=len(chosen) * len(seeds), unit="run") as bar:
        for arm in chosen:
            bar.set_description(arm.name)
            kept = study.arms.get(arm.name)
            experiment = _settings(arm, kept)
            if kept is None:
                tuning = tune(experiment, world) if arm.tuned else None
                if tuning is not None:
                    experiment = replace(
                        experiment, learning_rate=max(tuning, key=tuning.__getitem__)
                    )
                kept = {
                    "experiment": _without_seed(experiment),
                    "tuning": tuning and {f"{rate:g}": mean for rate, mean in tuning.items()},
                    "runs": [],
                }
                study.arms[arm.name] = kept
            for seed in seeds:
                if seed not in study.seeds(arm.name):
                    run = measure(replace(experiment, seed=seed), world)
                    kept["runs"].append(run.to_dict())
                    study.save(path)
                bar.update()
