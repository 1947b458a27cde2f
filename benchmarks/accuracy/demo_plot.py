"""The demonstration's figure: a row a network, with its learning curves and Q-Q plots."""

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

# Okabe and Ito's blue, vermilion and green, distinct under common colour vision deficiencies.
_LINES = (("#0072B2", "-"), ("#D55E00", "--"), ("#009E73", ":"))
_SHOWN_QUANTILES = 99
_CAPTION = (
    "Errors: mean and one standard error over seeds, dots: single seeds. "
    "Q-Q: median and 10th to 90th percentile over normalization groups, test images."
)
_STYLE = {"axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}


def _draw_curves(axes: Any, sides: Sequence[Side]) -> None:
    lowest = 100.0
    for side, (colour, style) in zip(sides, _LINES, strict=False):
        evaluated = [epoch for epoch in side.epochs if epoch.test_accuracy is not None]
        epochs = [epoch.epoch for epoch in evaluated]
        errors = 100.0 - torch.tensor([epoch.test_accuracy for epoch in evaluated])
        middle = errors.mean(1)
        lowest = min(lowest, float(middle.min()))
        spread = standard_error(side.accuracies)
        label = f"{side.layer}: {mean(side.accuracies):.1f}"
        label += " % right" if spread is None else f" ± {spread:.1f} % right"
        axes.plot(epochs, middle, style, color=colour, linewidth=2, label=label)
        last = errors[-1]
        axes.plot([epochs[-1]] * len(last), last, "o", color=colour, markersize=3)
        if len(last) > 1:
            band = errors.std(1) / len(last) ** 0.5
            low = (middle - band).clamp_min(0.05)
            axes.fill_between(epochs, low, middle + band, color=colour, alpha=0.18, linewidth=0)
    axes.set_yscale("log")
    axes.set_ylim(max(0.5 * lowest, 0.05), 100)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= 0.5 * lowest]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title=sides[0].network, xlabel="epoch", ylabel="test error (%), log scale")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)


def _quantile_curves(side: Side, count: int) -> Tensor:
    """Standardized empirical quantiles of every group of every run, (groups, count)."""
    groups = torch.cat(side.groups).double()
    deviation = groups.std(1, keepdim=True)
    groups = ((groups - groups.mean(1, keepdim=True)) / deviation)[deviation.squeeze(1) > 0]
    if groups.size(1) == count:
        return groups.sort(dim=1).values
    return torch.quantile(groups, torch.special.ndtr(normal_quantiles(count)), dim=1).T


def _draw_quantiles(axes: Any, sides: Sequence[Side]) -> None:
    count = min(sides[0].groups[0].size(1), _SHOWN_QUANTILES)
    quantiles = normal_quantiles(count)
    limit = 1.1 * float(quantiles[-1])
    axes.plot([-limit, limit], [-limit, limit], color="#5f5f5f", linewidth=1, label="normal")
    for side, (colour, style) in zip(sides, _LINES, strict=False):
        curves = _quantile_curves(side, count)
        if not len(curves):  # every feature is constant or not finite
            continue
        percentiles = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        low, middle, high = torch.quantile(curves, percentiles, dim=0)
        axes.fill_between(quantiles, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{side.layer}, $R^2$ = {mean(side.qq_r2):.3f}"
        axes.plot(quantiles, middle, style, color=colour, linewidth=2, label=label)
    axes.set(
        title="Q-Q plot, last norm layer",
        xlabel="quantile of the normal (standard deviations)",
        ylabel="quantile of the features (s.d.)",
        xlim=(-limit, limit),
    )


def draw(rows: Sequence[Sequence[Side]], title: str, path: Path) -> None:
    """Draws the layers of every network, a row each, into a PNG file."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(11, 1.2 + 4.2 * len(rows)), layout="constrained")
        figure.suptitle(title, fontsize=11)
        figure.supxlabel(_CAPTION, fontsize=9)
        panels = figure.subplots(len(rows), 2, squeeze=False)
        for sides, axes in zip(rows, panels, strict=True):
            _draw_curves(axes[0], sides)
            _draw_quantiles(axes[1], sides)
            for part in axes:
                part.grid(color="#e4e4e4")
                part.legend()
        figure.savefig(path, dpi=110)
