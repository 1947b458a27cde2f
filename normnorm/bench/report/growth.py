"""The figures of a study of scaling: fitted growth, collectives against their prediction, and the
model of several GPUs that they support."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from normnorm.bench.distributed_model import GPUS, PARAMETERS, StepTime, step_time
from normnorm.bench.gloo import CollectiveCheck
from normnorm.bench.report.figures import Plot, new_figure, no_ticks, plain, plain_log_ticks, styled
from normnorm.bench.report.style import GREY, look
from normnorm.bench.scaling import Fit, Scaling, Sweep

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["ALLOWED_ERROR", "exponent", "growth_plots", "model_is_supported"]

# How far a prediction may be from its measurement for the model to be shown.
ALLOWED_ERROR = 0.25
_CHECKED_PROCESSES = (2, 4)
_DASHES = {"BatchNormalNorm2d": "-", "LayerNormalNorm": (0, (4, 2))}
_SYNCHRONISED, _PLAIN = "#0072B2", "#1a1a1a"


def exponent(fit: Fit) -> str:
    """The exponent with half the width of its confidence interval."""
    if fit.low is None or fit.high is None:
        return f"{fit.exponent:.2f}"
    return f"{fit.exponent:.2f} ± {(fit.high - fit.low) / 2:.2f}"


def growth_plots(study: Scaling) -> Iterator[Plot]:
    """Every figure that a study has the numbers for."""
    if study.sweeps:
        yield Plot(
            "growth",
            "How cost grows",
            "Forward and backward in training with noise: measured (markers, from the 20th to the "
            "80th percentile) and fitted (lines), t = offset + c x^k; k with its 95 % confidence "
            "interval. Two thread counts give an exponent but no interval.",
            _growth_figure(study.sweeps),
        )
    if study.collectives:
        yield Plot(
            "collectives",
            "Messages between processes, predicted and measured",
            "alpha + b beta fitted to single all-reduces and all-gathers by gloo, summed over all "
            "messages of a training step, against the same sequence measured. Shaded: within 25 %.",
            _collectives_figure(study.collectives),
            model=True,
        )
    if model_is_supported(study.collectives):
        yield Plot(
            "several_gpus",
            "A ResNet-50 training step on several A100s, modelled",
            "Not measured: an alpha-beta model, each parameter with its source in the table. Bands "
            "reach from an optimist's parameters to a pessimist's; dashed beyond the number of "
            "processes at which the form of the model was checked. The cross is a published "
            "measurement with data loading, which the model leaves out.",
            _model_figure(),
            model=True,
        )


def model_is_supported(checks: Sequence[CollectiveCheck]) -> bool:
    """Whether predictions held at every number of processes that the model's form needs."""
    held = {check.processes for check in checks if abs(check.error) <= ALLOWED_ERROR}
    missed = {check.processes for check in checks if abs(check.error) > ALLOWED_ERROR}
    return set(_CHECKED_PROCESSES) <= held - missed


@styled
def _growth_figure(sweeps: Sequence[Sweep]) -> Figure:
    against = list(dict.fromkeys(sweep.against for sweep in sweeps))
    rows = (len(against) + 1) // 2
    figure, grid = new_figure(rows, 2, height=3.9 * rows, width=9.4)
    for i, axes in enumerate(grid.flat):
        if i >= len(against):
            axes.set_visible(False)
            continue
        mine = [sweep for sweep in sweeps if sweep.against == against[i]]
        for sweep in mine:
            _draw_sweep(axes, sweep)
        _finish(axes, against[i], mine)
    return figure


def _draw_sweep(axes: Any, sweep: Sweep) -> None:
    import numpy as np

    style = look(sweep.provider)
    dashes = _DASHES.get(sweep.layer, ":")
    xs = [point.x for point in sweep.points]
    middle = [point.median_ms for point in sweep.points]
    errors = [
        [max(0.0, p.median_ms - p.p20_ms) for p in sweep.points],
        [max(0.0, p.p80_ms - p.median_ms) for p in sweep.points],
    ]
    axes.errorbar(
        xs, middle, yerr=errors, color=style.colour, marker=style.marker, markersize=4,
        markerfacecolor=style.colour if dashes == "-" else "white", linestyle="", linewidth=0.8,
        alpha=0.75,
    )  # fmt: skip
    dense = np.geomspace(xs[0], xs[-1], 100)
    layer = sweep.layer.replace("NormalNorm", "").replace("2d", "")
    label = f"{style.label}, {layer}: {exponent(sweep.fit)}"
    axes.plot(
        dense, [sweep.fit(x) for x in dense], color=style.colour, linestyle=dashes, linewidth=1.7,
        label=label,
    )  # fmt: skip


def _finish(axes: Any, against: str, sweeps: Sequence[Sweep]) -> None:
    xs = sorted({point.x for sweep in sweeps for point in sweep.points})
    values = [point.median_ms for sweep in sweeps for point in sweep.points]
    low, high = min(values) / 2, max(values) * 12  # room for the legend
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_log_ticks(axes.yaxis, low, max(values) * 2, most=6)
    if len(xs) <= 6:
        axes.set_xticks(xs, [plain(x) for x in xs])
        axes.xaxis.set_minor_locator(no_ticks())
        axes.set_xlim(xs[0] / 1.15, xs[-1] * 1.15)
    else:
        plain_log_ticks(axes.xaxis, xs[0], xs[-1], most=6)
    axes.set(title=f"against {against}", xlabel=against, ylabel="ms")
    axes.legend(
        fontsize=8, loc="upper left", title="exponent k", title_fontsize=8, alignment="left"
    )


@styled
def _collectives_figure(checks: Sequence[CollectiveCheck]) -> Figure:
    figure, grid = new_figure(height=1.5 + 0.55 * len(checks))
    axes = grid[0, 0]
    axes.axvspan(100 * (1 - ALLOWED_ERROR), 100 * (1 + ALLOWED_ERROR), color="#dcebf5", zorder=0)
    axes.axvline(100, color="#1a1a1a", linewidth=1.4)
    for i, check in enumerate(checks):
        share = 100 * (1 + check.error)
        axes.barh(i, share - 100, 0.5, left=100, color=_SYNCHRONISED, alpha=0.9)
        text = f"{check.predicted_ms:.3g} ms predicted\n{check.measured_ms:.3g} ms measured"
        axes.annotate(
            text, (1, i), (6, 0), xycoords=("axes fraction", "data"), textcoords="offset points",
            va="center", fontsize=9, color=GREY,
        )  # fmt: skip
    names = [
        f"{check.what}\n{check.processes} processes, {check.calls} messages" for check in checks
    ]
    axes.set_yticks(range(len(checks)), names, fontsize=9)
    axes.set_ylim(len(checks) - 0.4, -0.6)
    reach = max(60.0, *(1.6 * abs(100 * check.error) for check in checks))
    axes.set_xlim(100 - reach, 100 + reach)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("predicted time in % of the measured; shaded: within 25 %")
    return figure


@styled
def _model_figure() -> Figure:
    figure, grid = new_figure(1, 2, height=4.3, width=9.4, width_ratios=(1.5, 1))
    times = {flag: [step_time(n, synchronised=flag) for n in GPUS] for flag in (False, True)}
    _draw_step(grid[0, 0], times)
    _draw_parts(grid[0, 1], times[True][-1])
    return figure


def _draw_step(axes: Any, times: dict[bool, list[StepTime]]) -> None:
    checked = max(_CHECKED_PROCESSES)
    for flag, colour, name in (
        (True, _SYNCHRONISED, "synchronised"),
        (False, _PLAIN, "each GPU's own"),
    ):
        low = [1e3 * time.total.low for time in times[flag]]
        high = [1e3 * time.total.high for time in times[flag]]
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        axes.fill_between(GPUS, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.plot(GPUS[:checked], middle[:checked], color=colour, linewidth=2.2)
        axes.plot(
            GPUS[checked - 1 :], middle[checked - 1 :], color=colour, linewidth=2.2,
            linestyle=(0, (4, 2)),
        )  # fmt: skip
        axes.annotate(
            f"{name} statistics", (GPUS[3], high[3] if flag else low[3]), (0, 6 if flag else -14),
            textcoords="offset points", color=colour, weight="bold", ha="center", fontsize=9.5,
        )  # fmt: skip
    published = 1e3 * GPUS[-1] * PARAMETERS["batch"].value / PARAMETERS["images_per_s_8"].value
    axes.plot(GPUS[-1], published, "x", color=_PLAIN, markersize=8, markeredgewidth=2)
    axes.annotate(
        "published, with data loading,\neach GPU's own statistics", (GPUS[-1], published),
        (GPUS[-1], 0.55 * published), ha="right", fontsize=8.5, color=_PLAIN,
        arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.8, "shrinkB": 5},
    )  # fmt: skip
    axes.set_ylim(0, 1.18 * max(1e3 * time.total.high for time in times[True]))
    axes.set(
        title="MODEL: time of a step", xlabel="A100s in one node", ylabel="ms, 256 images a GPU"
    )
    axes.set_xticks(GPUS)


def _draw_parts(axes: Any, time: StepTime) -> None:
    parts = {
        "small\nmessages": time.statistics,
        "reading\nagain": time.rereading,
        "gradients": time.gradients,
    }
    for i, span in enumerate(parts.values()):
        low, high = 1e3 * span.low, 1e3 * span.high
        axes.bar(i, high, 0.6, color=_SYNCHRONISED, alpha=0.25)
        axes.bar(i, low, 0.6, color=_SYNCHRONISED, alpha=0.9)
        axes.annotate(
            f"{low:.1f} to {high:.1f}", (i, high), (0, 3), textcoords="offset points", ha="center",
            fontsize=9, color=_SYNCHRONISED,
        )  # fmt: skip
    axes.set_xticks(range(len(parts)), list(parts), fontsize=9)
    axes.grid(visible=False, axis="x")
    axes.set_ylim(0, 1.15 * max(1e3 * span.high for span in parts.values()))
    axes.set(title="MODEL: what is added on 8", ylabel="ms, optimist to pessimist")
