"""Which runs a study compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

from normnorm.experiments.config import Experiment, recipe

__all__ = ["SEEDS", "TUNING_RATES", "TUNING_SEEDS", "Arm", "Comparison", "arms", "comparisons"]

SEEDS = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)
# The strong baseline's learning rate is chosen by runs that are not compared.
TUNING_SEEDS = (101, 102, 103)
TUNING_RATES = (0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True)
class Arm:
    """One setting, trained once for every seed.

    Attributes:
        name: what the tables call it.
        experiment: with any seed.
        tuned: whether its learning rate is chosen first.
    """

    name: str
    experiment: Experiment
    tuned: bool = False


@dataclass(frozen=True)
class Comparison:
    """An arm beside the one it is measured against, by name."""

    arm: str
    against: str


def _family(plain: str, title: str, base: Experiment) -> list[Arm]:
    """A plain norm, and what noise and transform add to it alone and together."""
    normal = replace(base, norm=plain + "normal")
    return [
        Arm(title, replace(base, norm=plain)),
        Arm(f"{title} + noise", replace(normal, alpha=0.0)),
        Arm(f"{title} + transform", replace(normal, noise_train=0.0)),
        Arm(f"{title} + both", normal),
    ]


def arms(epochs: int) -> list[Arm]:
    """All settings of the study of the digits."""
    images = Experiment(**{**recipe("digits", "convnet"), "model": "convnet", "epochs": epochs})
    tokens = Experiment(
        **{**recipe("digits", "transformer"), "model": "transformer", "epochs": epochs}
    )
    strong = replace(images, augment=True)
    return [
        *_family("batch", "batch", images),
        *_family("group", "group", images),
        *_family("instance", "instance", images),
        *_family("layer", "layer", tokens),
        Arm("decorrelated", replace(images, norm="decorrelated")),
        Arm("decorrelated + both", replace(images, norm="decorrelatednormal")),
        Arm("batch + PER", replace(images, norm="batch", per_weight=1e-2)),
        Arm("no norm", replace(images, norm="none")),
        Arm("strong batch", replace(strong, norm="batch"), tuned=True),
        Arm("strong batch + both", replace(strong, norm="batchnormal"), tuned=True),
    ]


def comparisons() -> list[Comparison]:
    """What the study asks, decided before it was run."""
    found = [
        Comparison(f"{family} + {part}", family)
        for family in ("batch", "group", "instance", "layer")
        for part in ("noise", "transform", "both")
    ]
    return [
        *found,
        Comparison("decorrelated + both", "decorrelated"),
        Comparison("batch + PER", "batch"),
        Comparison("strong batch + both", "strong batch"),
        Comparison("strong batch", "batch"),
    ]
