"""What the runs add up to: averages over seeds, the verdict, the table, the JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import mean, median, stdev
from typing import Any

from normnorm.demo.train import Run
from normnorm.quantiles import normal_r_squared

__all__ = ["Comparison", "Results", "judge", "standard_error", "table", "to_json"]

# Points of accuracy, beside a standard error, that a normality layer may lack.
TOLERANCE = 1.0


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean of independent values; None for a single one, which tells nothing of it."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


@dataclass
class Results:
    """One layer's runs, one a seed.

    Attributes:
        layer: its class's name.
        noise_train: weight of its noise; None for a plain layer.
    """

    layer: str
    noise_train: float | None
    runs: list[Run] = field(default_factory=list)

    @property
    def accuracies(self) -> list[float]:
        """Test accuracies after the last epoch, percent, in the order of the seeds."""
        return [run.test_accuracy[-1] for run in self.runs]

    @property
    def step_ms(self) -> float:
        """Median over every training step of every seed."""
        return median(ms for run in self.runs for ms in run.step_ms)

    @property
    def qq_r2(self) -> float:
        return mean(run.qq_r2 for run in self.runs)


@dataclass
class Comparison:
    """A network with a plain layer and with its normality counterpart.

    Attributes:
        network: what it is called.
        epochs: each run's.
        plain, normality: the two layers' results, run for run of the same seed.
        bar: percent that the plain layer must reach for the comparison to mean something.
    """

    network: str
    epochs: int
    plain: Results
    normality: Results
    bar: float | None = None

    @property
    def sides(self) -> tuple[Results, Results]:
        return self.plain, self.normality

    @property
    def normal_qq_r2(self) -> float:
        """The Q-Q R^2 of normal samples as large as the groups measured."""
        return normal_r_squared(self.plain.runs[0].groups.size(-1))


def judge(comparisons: Sequence[Comparison]) -> list[str]:
    """What falls short, a sentence each; empty when all is well.

    * A plain layer's mean accuracy below its comparison's bar.
    * A normality layer behind its plain counterpart by more than :data:`TOLERANCE` points and
      one standard error: that of the mean difference over seeds, which pairs the runs (with one
      seed, none).
    """
    sentences = []
    for comparison in comparisons:
        plain, normality = comparison.sides
        if comparison.bar is not None and not mean(plain.accuracies) >= comparison.bar:
            sentences.append(
                f"{plain.layer} reached {mean(plain.accuracies):.2f} % test accuracy; "
                f"at least {comparison.bar:g} % was expected"
            )
        pairs = zip(plain.accuracies, normality.accuracies, strict=True)
        behind = [p - n for p, n in pairs]
        allowed = TOLERANCE + (standard_error(behind) or 0.0)
        if not mean(behind) <= allowed:
            sentences.append(
                f"{normality.layer} is {mean(behind):.2f} points of test accuracy behind "
                f"{plain.layer}; {allowed:.2f} (a point and a standard error) is allowed"
            )
    return sentences


_COLUMNS = (
    "network", "layer", "noise_train", "accuracy %", "std. error", "ms a step", "Q-Q R^2",
    "(normal)",
)  # fmt: skip
_WORDS = 2  # columns that are words, to the left; numbers go to the right


def table(comparisons: Sequence[Comparison]) -> str:
    """The closing table, in plain ASCII."""
    rows = [list(_COLUMNS)]
    for comparison in comparisons:
        for name, side in zip((comparison.network, ""), comparison.sides, strict=True):
            error = standard_error(side.accuracies)
            rows.append([
                name,
                side.layer,
                "-" if side.noise_train is None else str(side.noise_train),
                f"{mean(side.accuracies):.2f}",
                "-" if error is None else f"{error:.2f}",
                f"{side.step_ms:.2f}",
                f"{side.qq_r2:.4f}",
                f"{comparison.normal_qq_r2:.4f}",
            ])  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if i < _WORDS else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(lines)


def _side_to_json(side: Results) -> dict[str, Any]:
    r2 = [run.qq_r2 for run in side.runs]
    return {
        "layer": side.layer,
        "noise_train": side.noise_train,
        "test_accuracy_percent": {
            "mean": mean(side.accuracies),
            "standard_error": standard_error(side.accuracies),
            "per_seed": side.accuracies,
        },
        "step_ms_median": side.step_ms,
        "qq_r2": {"mean": side.qq_r2, "standard_error": standard_error(r2), "per_seed": r2},
        "curves": {
            "train_loss": [run.train_loss for run in side.runs],
            "test_accuracy_percent": [run.test_accuracy for run in side.runs],
        },
    }


def _without_nan(value: Any) -> Any:
    """None for numbers that JSON lacks: a diverged run's."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
    """The comparisons in JSON's types; lists over seeds follow the order of the seeds."""
    return [
        {
            "network": comparison.network,
            "epochs": comparison.epochs,
            "qq_r2_of_normal_samples": comparison.normal_qq_r2,
            "layers": [_without_nan(_side_to_json(side)) for side in comparison.sides],
        }
        for comparison in comparisons
    ]
