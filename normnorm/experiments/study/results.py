"""A study's results as a file that grows by one run at a time, and their statistics."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats

import normnorm
from normnorm.experiments.libraries import ExperimentError

__all__ = ["Difference", "Study", "adjusted", "difference", "interval"]

FORMAT = "normnorm study 1"


@dataclass
class Study:
    """All that a study has measured so far.

    Attributes:
        environment: of the machine that ran it.
        arms: by name, ``experiment`` (without its seed), ``tuning`` (accuracy by learning rate, or
            None) and ``runs`` (a dictionary for each seed).
    """

    environment: dict[str, Any]
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def new(cls) -> Study:
        return cls(
            {
                "normnorm": normnorm.__version__,
                "torch": torch.__version__,
                "python": platform.python_version(),
                "machine": platform.platform(),
                "processors": os.cpu_count(),
                "threads": torch.get_num_threads(),
            }
        )

    @classmethod
    def load(cls, path: Path) -> Study:
        """What :meth:`save` wrote.

        Raises:
            ExperimentError: the file is not a study's.
        """
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is {content['format']!r}")
            study = cls(content["environment"], content["arms"])
            for arm in study.arms.values():
                arm["experiment"], arm["tuning"], [run["accuracy"] for run in arm["runs"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ExperimentError(f"{path} is not a study's result ({FORMAT}): {error}") from None
        return study

    def save(self, path: Path) -> None:
        """In one step: a kill leaves the file as it was."""
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(path.name + ".part")
        content = {"format": FORMAT, "environment": self.environment, "arms": self.arms}
        half.write_text(json.dumps(content, indent=1) + "\n")
        half.replace(path)

    def seeds(self, arm: str) -> set[int]:
        return {run["seed"] for run in self.arms.get(arm, {"runs": []})["runs"]}

    def values(self, arm: str, name: str) -> list[float]:
        """One measure of an arm over its seeds, in their order; empty where it was not taken."""
        runs = sorted(self.arms[arm]["runs"], key=lambda run: run["seed"])
        found = [run[name] for run in runs]
        return [] if None in found else found


@dataclass(frozen=True)
class Difference:
    """An arm less another, seed by seed.

    Attributes:
        mean: of the differences.
        low, high: the 95 % confidence interval of Student's t for pairs.
        p: of the paired t-test, two-sided; 1 where all differences are zero.
        pairs: how many.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def difference(study: Study, arm: str, against: str, name: str) -> Difference | None:
    """The paired difference of a measure; None where either lacks it, or fewer than two pairs."""
    mine, theirs = (
        {run["seed"]: run[name] for run in study.arms.get(a, {"runs": []})["runs"]}
        for a in (arm, against)
    )
    seeds = sorted(mine.keys() & theirs.keys())
    pairs = [(mine[s], theirs[s]) for s in seeds if None not in (mine[s], theirs[s])]
    if len(pairs) < 2:
        return None
    first, second = np.array(pairs).T
    if np.ptp(first - second) == 0:
        mean = float((first - second)[0])
        return Difference(mean, mean, mean, 1.0 if mean == 0 else 0.0, len(pairs))
    test = stats.ttest_rel(first, second)
    low, high = test.confidence_interval(0.95)
    return Difference(
        float((first - second).mean()), float(low), float(high), float(test.pvalue), len(pairs)
    )


def adjusted(p: list[float]) -> list[float]:
    """p-values for a false discovery rate over all of them (Benjamini and Hochberg)."""
    return [float(x) for x in stats.false_discovery_control(p)] if p else []


def interval(values: list[float]) -> tuple[float, float]:
    """The mean and half of its 95 % confidence interval."""
    if len(values) < 2:
        return (values[0] if values else math.nan), math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(np.mean(values)), float(half)
