"""What the report's figures share: their style, ticks in plain numbers, legends, line labels."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeVar

from normnorm.bench.report.style import RC, in_order, look, ours
from normnorm.bench.results import Measurement, NetworkMeasurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Plot",
    "label_ends",
    "legend",
    "new_figure",
    "no_ticks",
    "number",
    "plain",
    "plain_log_ticks",
    "save_figure",
    "styled",
    "times",
]

_WIDTH = 7.6  # inches: at the width of a phone its text can still be read


@dataclass(frozen=True)
class Plot:
    """A figure with its words.

    Attributes:
        name: of its file, without suffix.
        title, caption: for readers; the caption says how to read it.
        figure: matplotlib's.
        model: whether it shows a model beside, or instead of, measurements.
    """

    name: str
    title: str
    caption: str
    figure: Figure
    model: bool = False


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float, width: float = _WIDTH, **keywords: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, always as a grid. No window system is touched."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(function: Draw) -> Draw:
    """Lets a function draw or write in the report's style, whatever matplotlib's was before."""

    @functools.wraps(function)
    def within(*arguments: Any, **keywords: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(RC):
            return function(*arguments, **keywords)

    return within  # type: ignore[return-value]


@styled
def save_figure(plot: Plot, target: str | Path | BinaryIO, format: Literal["png", "svg"]) -> None:
    """Writes a plot, the same bytes for the same numbers."""
    metadata = (
        {"Date": None, "Creator": "normnorm"} if format == "svg" else {"Software": "normnorm"}
    )
    plot.figure.savefig(target, format=format, metadata=metadata, dpi=160)


def number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def label_ends(axes: Any, ends: dict[str, tuple[float, float]]) -> None:
    """Names at the right end of the lines, moved apart where they would overlap."""
    figure = axes.figure
    figure.canvas.draw()
    to_pixels, height = axes.transData.transform, 12.5 * figure.dpi / 72
    right = max(x for x, _ in ends.values())
    wanted = sorted(
        (float(to_pixels((right, y))[1]), provider) for provider, (_, y) in ends.items()
    )
    # Each at least a line's height above the one below, the whole moved back to the middle.
    placed: list[float] = []
    for pixel, _ in wanted:
        placed.append(max(pixel, placed[-1] + height) if placed else pixel)
    shift = sum(p - w for p, (w, _) in zip(placed, wanted, strict=True)) / len(placed)
    for pixel, (_, provider) in zip(placed, wanted, strict=True):
        x, y = ends[provider]
        offset = (pixel - shift - float(to_pixels((x, y))[1])) * 72 / figure.dpi
        style = look(provider)
        axes.annotate(
            style.label, (x, y), (9, offset), textcoords="offset points", va="center", fontsize=9,
            color=style.colour, weight="bold" if ours(provider) else "normal",
            annotation_clip=False,
        )  # fmt: skip


def legend(figure: Figure, names: Iterable[str], bars: bool = False, columns: int = 4) -> None:
    """Above everything, in the providers' own colours and markers; ours as bars where they are."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    for provider in in_order(names):
        style = look(provider)
        if bars and ours(provider):
            handles.append(Patch(color=style.colour, label=style.label))
        else:
            handles.append(
                Line2D(
                    [], [], color=style.colour, marker=style.marker, linestyle="", label=style.label
                )
            )
    figure.legend(
        handles=handles, loc="outside upper left", ncols=min(columns, len(handles)), fontsize=9.5,
        handletextpad=0.5, columnspacing=1.4, frameon=False,
    )  # fmt: skip


def plain_log_ticks(axis: Any, low: float, high: float, most: int = 9) -> None:
    """Ticks at 1, 2, 5 times powers of ten, in plain numbers; fewer over many decades."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1, 3), (1,)):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) <= most:
            break
    axis.set_ticks(ticks, [plain(tick) for tick in ticks])
    axis.set_minor_locator(no_ticks())


def no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def plain(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return (
                f"{value / size:.2g}{unit}" if value < 99.5 * size else f"{value / size:.0f}{unit}"
            )
    return f"{value:g}"


def times(row: Measurement | NetworkMeasurement) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile in ms of a row that was measured, in rising order about
    the median."""
    median, low, high = (value or math.nan for value in (row.median_ms, row.p20_ms, row.p80_ms))
    return median, min(low, median), max(high, median)
