"""The demonstration's figure: a row a network, with its learning curves and Q-Q plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib
import torch
from matplotlib.figure import Figure
from torch import Tensor

from accuracy.demo import Side, standard_error
from normnorm.diagnostics import normal_quantiles

# Okabe and Ito's blue and vermilion, distinct under common colour vision deficiencies.
_LINES = (("#0072B2", "-"), ("#D55E00", "--"))
_SHOWN_QUANTILES = 99
_CAPTION = (
    "Errors: mean and one standard error over seeds, dots: single seeds. "
    "Q-Q: median and 10th to 90th percentile over normalization groups, test images."
)
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _draw_curves(axes: Any, pair: Sequence[Side]) -> None:
    lowest = 100.0
    for side, (colour, style) in zip(pair, _LINES, strict=True):
        errors = torch.tensor(
            [[100.0 - epoch.test_accuracy for epoch in run.epochs] for run in side.runs]
        )
        epochs, middle = range(1, errors.size(1) + 1), errors.mean(0)
        lowest = min(lowest, float(middle.min()))
        spread = standard_error(side.accuracies)
        label = f"{side.layer}: {mean(side.accuracies):.2f}"
        label += " % right" if spread is None else f" ± {spread:.2f} % right"
        axes.plot(epochs, middle, style, color=colour, linewidth=2, label=label)
        axes.plot([epochs[-1]] * len(errors), errors[:, -1], "o", color=colour, markersize=3)
        if len(errors) > 1:
            band = errors.std(0) / len(errors) ** 0.5
            low = (middle - band).clamp_min(0.05)
            axes.fill_between(epochs, low, middle + band, color=colour, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(max(0.5 * lowest, 0.05), 100)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= 0.5 * lowest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title=pair[0].network, xlabel="epoch", ylabel="test error (%), log scale")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _quantile_curves(side: Side, count: int) -> Tensor:
    """Standardized empirical quantiles of every group of every run, (groups, count)."""
    groups = torch.cat([run.groups.double() for run in side.runs])
    deviation = groups.std(1, keepdim=True)
    groups = ((groups - groups.mean(1, keepdim=True)) / deviation)[deviation.squeeze(1) > 0]
    if groups.size(1) == count:
        return groups.sort(dim=1).values
    return torch.quantile(groups, torch.special.ndtr(normal_quantiles(count)), dim=1).T


def _draw_quantiles(axes: Any, pair: Sequence[Side]) -> None:
    count = min(pair[0].runs[0].groups.size(1), _SHOWN_QUANTILES)
    quantiles = normal_quantiles(count)
    limit = 1.1 * float(quantiles[-1])
    axes.plot([-limit, limit], [-limit, limit], color="#5f5f5f", linewidth=1, label="normal")
    for side, (colour, style) in zip(pair, _LINES, strict=True):
        curves = _quantile_curves(side, count)
        if not len(curves):  # every feature is constant or not finite
            continue
        percentiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        low, middle, high = torch.quantile(curves, percentiles, dim=0)
        axes.fill_between(quantiles, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{side.layer}, $R^2$ = {side.qq_r2:.3f}"
        axes.plot(quantiles, middle, style, color=colour, linewidth=2, label=label)
    axes.set(
        title="Q-Q plot, last norm layer",
        xlabel="quantile of the normal (standard deviations)",
        ylabel="quantile of the features (s.d.)",
        xlim=(-limit, limit),
    )


def draw(sides: Sequence[Side], title: str, path: Path) -> None:
    """Draws pairs of a plain and a normality layer into a PNG file."""
    with matplotlib.rc_context(_STYLE):
        rows = len(sides) // 2
        figure = Figure(figsize=(11, 1.2 + 4.2 * rows), layout="constrained")
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(_CAPTION, fontsize=9)
        for row, axes in enumerate(figure.subplots(rows, 2, squeeze=False)):
            pair = sides[2 * row : 2 * row + 2]
            _draw_curves(axes[0], pair)
            _draw_quantiles(axes[1], pair)
            for part in axes:
                part.grid(color="#e4e4e4")
                part.legend()
        figure.savefig(path, dpi=110)
