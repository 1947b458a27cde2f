"""What the plots share: the providers' labels, colours and markers, axes, ticks and legends."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar

from speed.results import Measurement, NetworkMeasurement

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Look",
    "Plot",
    "in_order",
    "label_ends",
    "legend",
    "look",
    "new_figure",
    "no_ticks",
    "number",
    "ours",
    "plain",
    "plain_log_ticks",
    "save_figure",
    "styled",
    "times",
]

class Look(NamedTuple):
    """A provider's appearance.

    Attributes:
        label: its name for readers.
        colour: told apart from the others by every common kind of colour vision (Okabe and Ito's
            palette, the yellow darkened), and by its marker without any.
        marker: matplotlib's letter.
    """

    label: str
    colour: str
    marker: str


_LOOKS = {
    "normnorm-cpu": Look("normnorm (CPU)", "#0072B2", "o"),
    "normnorm-cuda": Look("normnorm (CUDA)", "#0072B2", "o"),
    "normnorm-triton": Look("normnorm (Triton)", "#56B4E9", "D"),
    "normnorm-reference": Look("normnorm (reference)", "#7B4FA3", "p"),
    "torch": Look("torch", "#1a1a1a", "s"),
    "cudnn": Look("torch (cuDNN)", "#777777", "X"),
    "compiled-torch": Look("torch, compiled", "#E69F00", "v"),
    "compiled-reference": Look("definition, compiled", "#009E73", "^"),
    "reference": Look("definition, eager", "#CC79A7", "P"),
    "liger": Look("Liger", "#D55E00", "<"),
    "quack": Look("quack", "#8A7A00", ">"),
    "copy": Look("device copy", "#8c8c8c", "_"),
}
_OTHERS = ("#5B7083", "#A0522D", "#3B7A57", "#B03060")

RC = {
    "font.size": 10.5,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9a9a9a",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.8,
    "legend.frameon": False,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


def look(provider: str) -> Look:
    """A provider's look; one that is not known gets a colour of its own by its name."""
    if provider in _LOOKS:
        return _LOOKS[provider]
    return Look(provider, _OTHERS[sum(provider.encode()) % len(_OTHERS)], "h")


def in_order(providers: Iterable[str]) -> list[str]:
    """Each once, ours first, the copy last."""
    known = list(_LOOKS)
    return sorted(
        set(providers), key=lambda p: (known.index(p) if p in known else len(known) - 1.5, p)
    )


def ours(provider: str) -> bool:
    """Whether it is one of this project's backends."""
    return provider.startswith("normnorm-")


_WIDTH = 7.6  # inches: at the width of a phone its text can still be read


@dataclass(frozen=True)
class Plot:
    """A figure and the name of its file, without suffix; the title stands above the figure."""

    name: str
    title: str
    figure: Figure


def new_figure(
    rows: int = 1, columns: int = 1, *, height: float, width: float = _WIDTH, **keywords: Any
) -> tuple[Figure, Any]:
    """A figure and its axes, always as a grid. No window system is touched."""
    from matplotlib.figure import Figure as NewFigure

    figure = NewFigure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **keywords)


Draw = TypeVar("Draw", bound=Callable[..., Any])


def styled(function: Draw) -> Draw:
    """Draws or writes with the style RC; matplotlib's own settings are restored afterwards."""

    @functools.wraps(function)
    def within(*arguments: Any, **keywords: Any) -> Any:
        import matplotlib

        with matplotlib.rc_context(RC):
            return function(*arguments, **keywords)

    return within  # type: ignore[return-value]


@styled
def save_figure(plot: Plot, target: str | Path | BinaryIO) -> None:
    """Writes a plot as PNG under its title, the same bytes for the same numbers."""
    plot.figure.suptitle(plot.title, fontsize=10.5, weight="bold")
    plot.figure.savefig(target, format="png", metadata={"Software": "normnorm"}, dpi=160)


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
    """Below everything, in the providers' own colours and markers; ours as bars where they are."""
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
        handles=handles, loc="outside lower left", ncols=min(columns, len(handles)), fontsize=9.5,
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
