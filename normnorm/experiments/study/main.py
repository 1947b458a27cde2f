"""``normnorm study``."""

from __future__ import annotations

import argparse
import sys
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
    """Trains and writes; 0, or 2 with a sentence for what cannot be done."""
    from normnorm.experiments.libraries import ExperimentError

    try:
        _study(arguments)
    except ModuleNotFoundError as error:
        sentence = f"{error.name} is not installed: pip install 'normnorm[experiments]'"
    except (ExperimentError, ValueError) as error:
        sentence = str(error)
    else:
        return 0
    print(f"normnorm study: {sentence}", file=sys.stderr)
    return 2


def _study(arguments: argparse.Namespace) -> None:
    from normnorm.experiments.study.design import SEEDS, arms
    from normnorm.experiments.study.page import write
    from normnorm.experiments.study.results import Study

    if not 1 <= arguments.seeds <= len(SEEDS):
        raise ValueError(f"seeds must be 1 to {len(SEEDS)}; got {arguments.seeds}")
    if arguments.epochs < 1:
        raise ValueError(f"epochs must be positive; got {arguments.epochs}")
    chosen = arms(arguments.epochs)
    names = [arm.name for arm in chosen]
    unknown = [name for name in arguments.arms or [] if name not in names]
    if unknown:
        raise ValueError(f"arms must be among {', '.join(names)}; got {', '.join(unknown)}")
    if arguments.arms:
        chosen = [arm for arm in chosen if arm.name in arguments.arms]
    there = arguments.results.exists()
    study = Study.load(arguments.results) if there or arguments.no_training else Study.new()
    if not arguments.no_training:
        _train(study, chosen, SEEDS[: arguments.seeds], arguments.results)
    if arguments.page:
        image = arguments.page.parent / "images" / f"{arguments.page.stem}.png"
        write(study, arguments.page, image)


def _train(study: Any, chosen: list[Any], seeds: tuple[int, ...], path: Path) -> None:
    from tqdm import tqdm

    from normnorm.experiments.libraries import ExperimentError
    from normnorm.experiments.study.measure import measure, tune
    from normnorm.experiments.world import joined

    with joined("cpu") as world, tqdm(total=len(chosen) * len(seeds), unit="run") as bar:
        for arm in chosen:
            bar.set_description(arm.name)
            kept = study.arms.get(arm.name)
            experiment = arm.experiment
            if kept is None:
                tuning = tune(experiment, world) if arm.tuned else None
                if tuning is not None:
                    experiment = replace(
                        experiment, learning_rate=max(tuning, key=tuning.__getitem__)
                    )
                setting = experiment.to_dict()
                del setting["seed"]
                kept = {
                    "experiment": setting,
                    "tuning": tuning and {f"{rate:g}": mean for rate, mean in tuning.items()},
                    "runs": [],
                }
                study.arms[arm.name] = kept
            else:
                rate = kept["experiment"]["learning_rate"]
                experiment = replace(experiment, learning_rate=rate) if arm.tuned else experiment
                wanted = {k: v for k, v in experiment.to_dict().items() if k != "seed"}
                if wanted != kept["experiment"]:
                    raise ExperimentError(
                        f"{path} holds '{arm.name}' with other settings; name another --results"
                    )
            for seed in seeds:
                if seed not in study.seeds(arm.name):
                    run = measure(replace(experiment, seed=seed), world)
                    kept["runs"].append(run.to_dict())
                    study.save(path)
                bar.update()
