"""The study of the digits: every norm with and without noise and transform over many seeds, in a
file of results that grows by one run at a time."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy import stats
from torch import Tensor
from tqdm import tqdm

import normnorm.environment
from accuracy.data import load
from accuracy.experiment import Experiment, recipe
from accuracy.layers import DecorrelatedBatchNorm2d
from accuracy.trainer import Trainer, World, process_group
from commands import check_folder, check_output
from normnorm import diagnostics
from normnorm.cli import CommandError, execute

FORMAT = "normnorm study 1"
SEEDS = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
# The strong baseline's learning rate is chosen on seeds, and so on test images, of its own.
TUNING_SEEDS = (101, 102, 103)
TUNING_RATES = (0.02, 0.05, 0.1, 0.2)
TUNED = ("strong batch", "strong batch + both")
_INPUT_NOISE = 1.0  # standard deviations of the images
_LAYER_NOISE = 0.5  # standard deviations of a layer's output
_OF_LAYERS = ("qq_r2", "joint_distance", "correlation", "mutual_information")


def arms(epochs: int) -> dict[str, Experiment]:
    """The settings that are compared, by name, each trained once for every seed."""
    images, tokens = (
        Experiment(**{**recipe("digits", model), "epochs": epochs})
        for model in ("convnet", "transformer")
    )
    found: dict[str, Experiment] = {}
    for plain in ("batch", "group", "instance", "layer"):
        base = tokens if plain == "layer" else images
        normal = replace(base, norm=f"{plain}normal")
        found |= {
            plain: replace(base, norm=plain),
            f"{plain} + noise": replace(normal, alpha=0.0),
            f"{plain} + transform": replace(normal, noise_train=0.0),
            f"{plain} + both": normal,
        }
    strong = replace(images, augment=True)
    return found | {
        "decorrelated": replace(images, norm="decorrelated"),
        "decorrelated + both": replace(images, norm="decorrelatednormal"),
        "batch + PER": replace(images, norm="batch", per_weight=1e-2),
        "no norm": replace(images, norm="none"),
        "strong batch": replace(strong, norm="batch"),
        "strong batch + both": replace(strong, norm="batchnormal"),
    }


# Pairs of an arm and the one that it is compared with, fixed before the study was run.
COMPARISONS = (
    *(
        (f"{family} + {part}", family)
        for family in ("batch", "group", "instance", "layer")
        for part in ("noise", "transform", "both")
    ),
    ("decorrelated + both", "decorrelated"),
    ("batch + PER", "batch"),
    ("strong batch + both", "strong batch"),
    ("strong batch", "batch"),
)


# The results.


@dataclass
class Study:
    """All that a study has measured so far.

    Attributes:
        environment: of the machine that ran it.
        arms: by name, ``experiment`` (without its seed), ``tuning`` (accuracy by learning rate, or
            None) and ``runs`` (a dictionary for each seed).
    """

    environment: dict[str, Any] = field(default_factory=normnorm.environment.facts)
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Study:
        """What :meth:`save` wrote.

        Raises:
            CommandError: the file is not a study's.
        """
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            study = cls(content["environment"], content["arms"])
            for arm in study.arms.values():
                arm["tuning"], [run["accuracy"] for run in arm["runs"]]
                Experiment(**arm["experiment"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CommandError(f"{path} is not a study's result ({FORMAT}): {error}") from None
        return study

    def save(self, path: Path) -> None:
        """Writes a copy and renames it: a kill leaves the file as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".part")
        content = {"format": FORMAT, "environment": self.environment, "arms": self.arms}
        half.write_text(json.dumps(content, indent=1) + "\n")
        half.replace(path)

    def by_seed(self, arm: str, name: str) -> dict[int, float]:
        """One measure of an arm, in the order of the seeds; without runs that lack it."""
        runs = sorted(self.arms.get(arm, {"runs": []})["runs"], key=lambda run: run["seed"])
        return {run["seed"]: run[name] for run in runs if run[name] is not None}


class Difference(NamedTuple):
    """The mean of paired differences, the 95 % confidence interval of Student's t, and the p-value
    of the paired t-test, two-sided; 1 where all differences are zero."""

    mean: float
    low: float
    high: float
    p: float


def difference(study: Study, arm: str, against: str, name: str) -> Difference | None:
    """An arm less another, seed by seed; None for fewer than two seeds in common."""
    mine, theirs = study.by_seed(arm, name), study.by_seed(against, name)
    seeds = [seed for seed in mine if seed in theirs]
    if len(seeds) < 2:
        return None
    differences = np.array([mine[seed] - theirs[seed] for seed in seeds])
    middle = float(differences.mean())
    if np.ptp(differences) == 0:
        return Difference(middle, middle, middle, 1.0 if middle == 0 else 0.0)
    test = stats.ttest_1samp(differences, 0.0)
    low, high = test.confidence_interval(0.95)
    return Difference(middle, float(low), float(high), float(test.pvalue))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean and half of its 95 % confidence interval."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)


# The runs.


def measure(experiment: Experiment, world: World, layers: bool = True) -> dict[str, Any]:
    """Trains an experiment; what one seed of one arm gave.

    Returns:
        * ``accuracy``: of the test images after the last epoch, percent;
        * ``noisy_accuracy``: with Gaussian noise of one standard deviation on the images;
        * ``change``: relative change of the outputs under noise of half a standard deviation on a
          norm layer's output;
        * ``qq_r2``, ``joint_distance``, ``correlation``, ``mutual_information``: of the norm
          layers' outputs on test images (:mod:`normnorm.diagnostics`);
        * ``step_ms``: the median training step.

        Numbers of norm layers are means over them; None without any, or without ``layers``.
    """
    trainer = Trainer(experiment, load(experiment.dataset, Path("data"), experiment.seed), world)
    epochs = trainer.train()
    found: dict[str, Any] = dict.fromkeys(("change", *_OF_LAYERS))
    if layers and experiment.norm != "none":
        found |= _of_layers(trainer)
    generator = torch.Generator().manual_seed(experiment.seed)

    def noisy(images: Tensor) -> Tensor:
        return images + _INPUT_NOISE * torch.randn(images.shape, generator=generator)

    return {
        "seed": experiment.seed,
        "accuracy": epochs[-1].test_accuracy,
        "noisy_accuracy": trainer.accuracy(noisy),
        **found,
        "step_ms": median(epoch.step_ms for epoch in epochs),
    }


def _of_layers(trainer: Trainer) -> dict[str, float]:
    chosen = None
    if trainer.experiment.norm.startswith("decorrelated"):  # one norm layer, not those inside it
        chosen = lambda _, module: isinstance(module, DecorrelatedBatchNorm2d)  # noqa: E731
    layers = diagnostics.diagnose(
        trainer.network, trainer.test_batches(), chosen, sample_size=1024, channels=32,
        projections=32,
    ).layers.values()  # fmt: skip
    changes = diagnostics.noise_robustness(
        trainer.network, trainer.test_batches(), chosen, scales=(_LAYER_NOISE,)
    )
    found = {name: mean(getattr(layer, name) for layer in layers) for name in _OF_LAYERS}
    return {"change": mean(by_scale[_LAYER_NOISE] for by_scale in changes.values()), **found}


def _tune(experiment: Experiment, world: World) -> dict[float, float]:
    """The mean accuracy of every learning rate."""
    return {
        rate: mean(
            measure(replace(experiment, learning_rate=rate, seed=seed), world, False)["accuracy"]
            for seed in TUNING_SEEDS
        )
        for rate in TUNING_RATES
    }


def _check(study: Study, chosen: dict[str, Experiment], path: Path) -> None:
    """Refuses arms that were run with other settings; those that were tuned get their rate."""
    other = []
    for name in chosen.keys() & study.arms.keys():
        stored = Experiment(**study.arms[name]["experiment"])
        if name in TUNED:
            chosen[name] = replace(chosen[name], learning_rate=stored.learning_rate)
        if replace(chosen[name], seed=stored.seed) != stored:
            other.append(f"'{name}'")
    if other:
        raise CommandError(
            f"{path} holds {', '.join(sorted(other))} with other settings; name another --results"
        )


def _train(
    study: Study, chosen: dict[str, Experiment], seeds: tuple[int, ...], path: Path
) -> None:
    with process_group("cpu") as world, tqdm(total=len(chosen) * len(seeds), unit="run") as bar:
        for name, experiment in chosen.items():
            bar.set_description(name)
            if name not in study.arms:
                tuning = _tune(experiment, world) if name in TUNED else None
                if tuning:
                    best = max(tuning, key=tuning.__getitem__)
                    experiment = replace(experiment, learning_rate=best)
                setting = experiment.to_dict()
                del setting["seed"]
                study.arms[name] = {
                    "experiment": setting,
                    "tuning": tuning and {f"{rate:g}": found for rate, found in tuning.items()},
                    "runs": [],
                }
            for seed in seeds:
                if seed not in study.by_seed(name, "accuracy"):
                    run = measure(replace(experiment, seed=seed), world)
                    study.arms[name]["runs"].append(run)
                    study.save(path)
                bar.update()


def _run(args: argparse.Namespace) -> int:
    from accuracy.study_page import write

    if not 1 <= args.seeds <= len(SEEDS):
        raise CommandError(f"seeds must be 1 to {len(SEEDS)}; got {args.seeds}")
    if args.epochs < 1:
        raise CommandError(f"epochs must be positive; got {args.epochs}")
    every = arms(args.epochs)
    unknown = [name for name in args.arms or [] if name not in every]
    if unknown:
        raise CommandError(f"arms must be among {', '.join(every)}; got {', '.join(unknown)}")
    chosen = {name: arm for name, arm in every.items() if name in (args.arms or every)}
    path, page = args.results, args.page
    check_folder(path.parent)
    if path.is_dir():
        check_output("--results", path)
    image = page and page.parent / "images" / f"{page.stem}.png"
    if page:
        check_output("--page", page)
        check_folder(image.parent)
    study = Study.load(path) if path.exists() or args.no_training else Study()
    if not args.no_training:
        _check(study, chosen, path)
        try:
            _train(study, chosen, SEEDS[: args.seeds], path)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(
                f"the same command goes on with the runs that {path} lacks"
            ) from None
    if page:
        write(study, page, image)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Trains the runs that the results lack and writes the page; the exit status."""
    parser = argparse.ArgumentParser(
        prog="study.py",
        description="Trains every norm with and without noise and transform on handwritten digits, "
        "over several seeds, and writes a page of results. Runs that the results hold already are "
        "not repeated, so that a killed study goes on.",
    )
    parser.add_argument("--results", type=Path, default=Path("runs/study.json"))
    parser.add_argument("--seeds", type=int, default=10, help="how many, at most 10 (10)")
    parser.add_argument("--epochs", type=int, default=20, help="(20)")
    parser.add_argument("--arms", nargs="+", help="by name; all by default")
    parser.add_argument("--page", type=Path, help="where the page is written; else none is")
    parser.add_argument("--no-training", action="store_true", help="the page of what is there")
    parser.set_defaults(run=_run, extra="accuracy")
    return execute(parser, arguments)
