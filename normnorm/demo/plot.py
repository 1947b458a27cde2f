"""The figure: learning curves, quantile-quantile plots and final errors, a row a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from normnorm.demo.results import Comparison, Results, standard_error
from normnorm.quantiles import normal_quantiles

__all__ = ["draw"]

# Okabe and Ito's blue and vermilion, told apart by every common kind of colour vision.
_COLOURS = ("#0072B2", "#D55E00")
_STYLES = ((0, ()), (0, (5, 1.5)))
_GREY = "#5f5f5f"
_SHOWN_QUANTILES = 99
_CAPTION = (
    "Shades and whiskers of the errors: one standard error over seeds; dots: single seeds. "
    "Q-Q: median and 10th to 90th percentile over the groups normalized together, test images."
)
_STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
}


def _name(side: Results) -> str:
    return side.layer if side.noise_train is None else f"{side.layer}, noise {side.noise_train}"


def _errors(side: Results) -> Tensor:
    """Test error in percent, (seeds, epochs)."""
    return 100.0 - torch.tensor([run.test_accuracy for run in side.runs], dtype=torch.float64)


def _draw_curves(axes: Any, comparison: Comparison) -> None:
    epochs = range(1, comparison.epochs + 1)
    for side, colour, style in zip(comparison.sides, _COLOURS, _STYLES, strict=True):
        errors = _errors(side)
        middle = errors.mean(0)
        axes.plot(
            epochs, middle, color=colour, linestyle=style, linewidth=2, label=_name(side),
            marker="o" if comparison.epochs == 1 else None,
        )  # fmt: skip
        if len(side.runs) > 1:
            band = errors.std(0) / len(side.runs) ** 0.5
            axes.fill_between(
                epochs, (middle - band).clamp_min(0.05), middle + band, color=colour, alpha=0.18,
                linewidth=0,
            )  # fmt: skip
    axes.set_yscale("log")
    low = min(float(_errors(side).mean(0).min()) for side in comparison.sides)
    axes.set_ylim(max(0.5 * low, 0.05), 100)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if tick >= 0.5 * low]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(title="Learning curves", xlabel="epoch", ylabel="test error (%), log scale")
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.legend(loc="upper right")


def _quantile_curves(side: Results, count: int) -> Tensor:
    """Standardized empirical quantiles of every group of every run, (groups, count)."""
    groups = torch.cat([run.groups.double() for run in side.runs])
    deviation = groups.std(1, keepdim=True)
    groups = ((groups - groups.mean(1, keepdim=True)) / deviation)[deviation.squeeze(1) > 0]
    values = groups.sort(dim=1).values
    if values.size(1) <= count:
        return values
    probabilities = torch.special.ndtr(normal_quantiles(count))
    return torch.quantile(values, probabilities, dim=1).T


def _draw_quantiles(axes: Any, comparison: Comparison) -> None:
    fewest = min(run.groups.size(1) for side in comparison.sides for run in side.runs)
    count = min(fewest, _SHOWN_QUANTILES)
    quantiles = normal_quantiles(count)
    limit = 1.1 * float(quantiles[-1])
    axes.plot([-limit, limit], [-limit, limit], color=_GREY, linewidth=1, label="normal")
    for side, colour, style in zip(comparison.sides, _COLOURS, _STYLES, strict=True):
        curves = _quantile_curves(side, count)
        if not len(curves):  # every feature constant or not a number
            continue
        low, middle, high = torch.quantile(
            curves, torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64), dim=0
        )
        axes.fill_between(quantiles, low, high, color=colour, alpha=0.18, linewidth=0)
        label = f"{side.layer}, $R^2$ = {side.qq_r2:.3f}"
        axes.plot(quantiles, middle, color=colour, linestyle=style, linewidth=2, label=label)
    axes.set(
        title="Q-Q plot, last normalization layer",
        xlabel="quantile of the normal (standard deviations)",
        ylabel="quantile of the features (s.d.)",
        xlim=(-limit, limit),
    )
    axes.legend(loc="upper left")


def _draw_bars(axes: Any, comparison: Comparison) -> None:
    # At least something, should every image be classified rightly.
    top = max(100.0 - min(min(side.accuracies) for side in comparison.sides), 0.1)
    for position, (side, colour) in enumerate(zip(comparison.sides, _COLOURS, strict=True)):
        errors = [100.0 - accuracy for accuracy in side.accuracies]
        error = standard_error(side.accuracies)
        axes.bar(
            position, mean(errors), 0.62, color=colour, alpha=0.85, yerr=error, capsize=5,
            error_kw={"elinewidth": 1.6, "capthick": 1.6},
        )  # fmt: skip
        middle = (len(errors) - 1) / 2
        spread = [position + 0.28 / len(errors) * (i - middle) for i in range(len(errors))]
        axes.scatter(
            spread, errors, s=16, color="white", edgecolor="#222222", linewidth=0.9,
            zorder=3,
        )  # fmt: skip
        accuracy = f"{mean(side.accuracies):.2f}"
        accuracy += " %" if error is None else f" ± {error:.2f} %"
        axes.text(
            position, 1.07 * top, f"accuracy\n{accuracy}\n{side.step_ms:.1f} ms a step",
            ha="center", color=colour, bbox={"color": "white", "pad": 2},
        )  # fmt: skip
    axes.set_xticks([0, 1], [_name(side).replace(", ", "\n") for side in comparison.sides])
    axes.set(
        title="Final test error", ylabel="test error (%)", xlim=(-0.6, 1.6), ylim=(0, 1.36 * top)
    )
    axes.grid(visible=False, axis="x")


def draw(comparisons: Sequence[Comparison], title: str, path: Path) -> None:
    """Draws the comparisons into a PNG file.

    Learning curves are means over seeds within a standard error. The Q-Q plots show the median
    over all normalized groups of all seeds within their 10th and 90th percentiles. The bars are
    means over seeds with standard errors, the dots single seeds.
    """
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with matplotlib.rc_context(_STYLE):
        rows = len(comparisons)
        layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.06)  # inches
        figure = Figure(figsize=(15, 1.2 + 4.4 * rows), layout=layout)
        figure.suptitle(title, fontsize=14)
        figure.supxlabel(_CAPTION, fontsize=9, color=_GREY)
        for part, comparison in zip(
            figure.subfigures(rows, 1, squeeze=False)[:, 0], comparisons, strict=True
        ):
            part.suptitle(
                comparison.network.capitalize(), fontsize=13, weight="bold", x=0.008, ha="left"
            )
            curves, quantiles, bars = part.subplots(1, 3, width_ratios=(1.15, 1.0, 0.95))
            _draw_curves(curves, comparison)
            _draw_quantiles(quantiles, comparison)
            _draw_bars(bars, comparison)
        figure.savefig(path, dpi=110)
