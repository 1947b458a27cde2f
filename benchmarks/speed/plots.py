"""Plots of one run, as PNG: ratios to torch's layer, time and rate against size, networks."""

import io
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from speed.results import (
    MODES,
    PASSES,
    Measurement,
    NetworkMeasurement,
    Results,
    ResultsError,
    grouped,
    write_atomically,
)

_MOST_WORKS = 20  # in one figure of ratios
_BAR = 0.66  # of a work's height that its bars fill
_WIDTH = 7.6  # inches: at the width of a phone its text can still be read
_STYLE = {
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
    "xtick.color": "#444444",
    "ytick.color": "#444444",
}


class Look(NamedTuple):
    """A provider's appearance."""

    label: str  # its name for readers
    # Told apart from the others by every common kind of colour vision (Okabe and Ito's palette, the
    # yellow darkened), and by its marker without any.
    colour: str
    marker: str  # matplotlib's letter


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


def look(provider: str) -> Look:
    """A provider's look; one that is not listed gets a colour by its name."""
    other = Look(provider, _OTHERS[sum(provider.encode()) % len(_OTHERS)], "h")
    return _LOOKS.get(provider, other)


def in_order(providers: Iterable[str]) -> list[str]:
    """Each once, ours first, the copy last."""
    known = list(_LOOKS)
    return sorted(
        set(providers), key=lambda p: (known.index(p) if p in known else len(known) - 1.5, p)
    )


def _ours(provider: str) -> bool:
    return provider.startswith("normnorm-")


class Plot(NamedTuple):
    """A figure and the name of its file, without suffix; the title stands above the figure."""

    name: str
    title: str
    figure: Figure


def write_plots(runs: Sequence[Results], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every plot that a run has the numbers for as PNG, the same bytes for the same numbers;
    with several runs, their numbers lead the names.

    Returns:
        The files, in order.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from None
    written = []
    for number, results in enumerate(runs, start=1):
        prefix = f"{number}_" if len(runs) > 1 else ""
        with matplotlib.rc_context(_STYLE):
            plots = [*_ratios(results), *_sizes(results), *_networks(results)]
        for plot in plots:
            out = io.BytesIO()
            plot.figure.suptitle(plot.title, fontsize=10.5, weight="bold")
            plot.figure.savefig(out, format="png", metadata={"Software": "normnorm"}, dpi=160)
            written.append(Path(folder) / f"{prefix}{plot.name}.png")
            write_atomically(written[-1], out.getvalue())
    return written


# Shared by all


def _figure(rows: int, height: float, **keywords: Any) -> tuple[Figure, Any]:
    """A figure and its axes, one below the other. No window system is touched."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots(rows, 1, squeeze=False, **keywords)[:, 0]


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def _plain(value: float, _: object = None) -> str:
    """A tick in few characters: 65k."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.4g}"


def _log_ticks(axis: Any, low: float, high: float) -> None:
    """Plain numbers on a log axis, at 1, 2 and 5 times powers of ten where there is room."""
    steps = (1, 1.5, 2, 3, 5, 7) if high < 8 * low else (1, 2, 5) if high < 300 * low else (1,)
    axis.set_major_locator(LogLocator(subs=steps, numticks=12))
    axis.set_major_formatter(FuncFormatter(_plain))
    axis.set_minor_locator(NullLocator())


def _legend(figure: Figure, providers: Iterable[str]) -> None:
    """Below everything, in the providers' own colours and markers."""
    handles = [
        Line2D(
            [], [], color=look(p).colour, marker=look(p).marker, linestyle="", label=look(p).label
        )
        for p in in_order(providers)
    ]
    figure.legend(
        handles=handles, loc="outside lower left", ncols=min(4, len(handles)), fontsize=9.5,
        handletextpad=0.5, columnspacing=1.4, frameon=False,
    )  # fmt: skip


# Ratios


def _ratios(results: Results) -> Iterator[Plot]:
    shown = [
        row
        for row in results.measurements
        if row.status == "ok"
        and row.ratio is not None
        and row.operation == ("forward" if row.mode == "eval" else "full")
        and "sweep" not in row.suite
        and row.provider not in ("copy", "torch", "cudnn")
    ]
    for (mode, dtype), rows in grouped(shown, lambda row: (row.mode, row.dtype)).items():
        # A work that two suites measured counts once.
        works = [
            {row.provider: row for row in reversed(same)}
            for same in grouped(rows, lambda row: row.work).values()
        ]
        parts = math.ceil(len(works) / _MOST_WORKS)
        for part in range(parts):
            which = f", {part + 1} of {parts}" if parts > 1 else ""
            what = f"{PASSES[rows[0].operation]}, {MODES[mode]}, {dtype}{which}"
            yield Plot(
                f"ratio_{mode}_{dtype}" + (f"_{part + 1}" if part else ""),
                f"Time relative to torch's layer: {what}",
                _ratio_figure(works[part * _MOST_WORKS : (part + 1) * _MOST_WORKS]),
            )


def _ratio_figure(works: Sequence[dict[str, Measurement]]) -> Figure:
    """A line a work: our backends as bars from 1, the others as markers."""
    bars = max(1, max(sum(map(_ours, group)) for group in works))
    figure, (axes,) = _figure(1, 1.4 + 0.42 * len(works) * (1 + 0.45 * (bars - 1)))
    ends = [1.0]
    for position, group in enumerate(works):
        mine = [provider for provider in in_order(group) if _ours(provider)]
        for provider, row in group.items():
            style, ratio = look(provider), row.ratio or math.nan
            low, high = (ratio * t / row.times[0] for t in row.times[1:])
            ends += [low, high]
            whiskers = {"xerr": [[ratio - low], [high - ratio]], "linewidth": 1}
            if provider not in mine:
                axes.errorbar(
                    ratio, position, color=style.colour, marker=style.marker, markersize=6.5,
                    **whiskers,
                )  # fmt: skip
                continue
            y = position + (mine.index(provider) - (bars - 1) / 2) * _BAR / bars
            axes.barh(y, ratio - 1, 0.92 * _BAR / bars, left=1, color=style.colour, alpha=0.9)
            axes.errorbar(ratio, y, color="#222222", capsize=2, **whiskers)
            slower = ratio >= 1
            axes.annotate(
                _number(ratio), (high if slower else low, y), (5 if slower else -5, 0),
                textcoords="offset points", va="center", ha="left" if slower else "right",
                fontsize=9.5, weight="bold", color=style.colour,
            )  # fmt: skip
    axes.axvline(1, color="#1a1a1a", linewidth=1.4)
    axes.set_xscale("log")
    # Room for the numbers beside the bars, in proportion to what the axis spans.
    low, high = min(ends), max(ends)
    room = 1.25 * (high / low) ** 0.12
    low, high = low / (1.35 if low == 1 else room), high * room
    axes.set_xlim(low, high)
    _log_ticks(axes.xaxis, low, high)
    labels = []
    for group in works:
        row = next(iter(group.values()))
        launches = " with launches" if row.method == "stream" else ""
        labels.append(f"{row.layer} {row.input}{launches}")
    axes.set_yticks(range(len(works)), labels, fontsize=9)
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time / torch's time (log scale; 1 = torch's layer)")
    _legend(figure, (provider for group in works for provider in group))
    return figure


# Time and rate against size


def _sizes(results: Results) -> Iterator[Plot]:
    """Each sweep over what it varies, and everything else over its number of elements."""
    shown = [
        row
        for row in results.select(status="ok", mode="noise", operation="full")
        if row.median_ms and row.provider != "copy"
    ]
    kinds = grouped(shown, lambda row: ("sweep" in row.suite and row.suite, row.dtype))
    for (sweep, dtype), rows in kinds.items():
        if len({row.x_value for row in rows}) < 2:
            continue
        name, title = "size", "Every layer by its size"
        if sweep:
            sizes = zip(*(row.shape for row in rows), strict=True)
            shape = "x".join("·" if len(set(size)) > 1 else str(size[0]) for size in sizes)
            name = sweep.replace(" ", "_")
            title = f"{rows[0].layer} {shape} against {rows[0].x_name}"
        figure = _size_figure(results, rows, lines=bool(sweep))
        yield Plot(f"{name}_{dtype}", f"{title}, {dtype}", figure)


def _size_figure(results: Results, rows: Sequence[Measurement], lines: bool) -> Figure:
    """Times above, rates below, by provider; ``lines`` connects the points of a sweep."""
    figure, (time, rate) = _figure(2, 7.2, sharex=True)
    by_provider = grouped(rows, lambda row: row.provider)
    for provider in reversed(in_order(by_provider)):
        mine = sorted(by_provider[provider], key=lambda row: row.x_value)
        xs, style = [row.x_value for row in mine], look(provider)
        for axes in (time, rate):
            ys = [
                [row.model_bytes / t * 1e-6 if axes is rate else t for t in row.times]
                for row in mine
            ]
            middle, low, high = zip(*ys, strict=True)
            axes.plot(
                xs, middle, color=style.colour, marker=style.marker, markersize=5.5,
                linewidth=lines * (2.4 if _ours(provider) else 1.6), markeredgecolor="white",
                markeredgewidth=0.6, zorder=3 if _ours(provider) else 2,
            )  # fmt: skip
            if lines:
                axes.fill_between(xs, low, high, color=style.colour, alpha=0.16, linewidth=0)
    copies = {row.x_value: copy.gb_per_s for row in rows if (copy := results.copy_of(row))}
    if copies:
        roof = zip(*sorted(copies.items()), strict=True)
        how = {"linestyle": (0, (5, 2))} if lines else {"linestyle": "", "marker": "_", "ms": 14}
        rate.plot(*roof, color=look("copy").colour, linewidth=1.5, **how)
    for axes in (time, rate):
        axes.set_xscale("log")
        axes.set_yscale("log")
        _log_ticks(axes.yaxis, *axes.get_ylim())
    _log_ticks(rate.xaxis, *rate.get_xlim())
    if lines:
        rate.set_xticks(sorted({row.x_value for row in rows}))
    time.set(title="Time", ylabel="ms a call (log scale)")
    rate.set(title="Rate, by the bytes of one read and one write a pass", ylabel="GB/s (log scale)")
    rate.set_xlabel(f"{rows[0].x_name} (log scale)")
    _legend(figure, [*by_provider, *(["copy"] if copies else [])])
    return figure


# Networks


def _networks(results: Results) -> Iterator[Plot]:
    timed = (row for row in results.networks if row.status == "ok")
    works = list(grouped(timed, lambda row: row.work).values())
    if works:
        yield Plot("networks", "Training steps of whole networks", _network_figure(works))


def _network_figure(works: Sequence[Sequence[NetworkMeasurement]]) -> Figure:
    bars = sum(map(len, works))
    figure, grid = _figure(len(works), 0.9 + 0.5 * (bars + 1.6 * len(works)))
    for axes, group in zip(grid, works, strict=True):
        for i, row in enumerate(group):
            style, (median, low, high) = look(row.provider), row.times
            axes.barh(i, median, 0.62, color=style.colour, alpha=0.9)
            axes.errorbar(
                median, i, xerr=[[median - low], [high - median]], color="#444444", linewidth=1,
                capsize=2,
            )  # fmt: skip
            text = f"{row.rate:,.0f} {row.unit}/s"
            if row.ratio is not None and row.provider != row.peer:
                text += f", {_number(row.ratio)}x"
            axes.annotate(
                text, (high, i), (6, 0), textcoords="offset points", va="center", fontsize=9,
                color=style.colour,
            )  # fmt: skip
        names = [f"{row.norm}\n{look(row.provider).label}" for row in group]
        axes.set_yticks(range(len(group)), names, fontsize=9)
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * max(row.times[2] for row in group))
        axes.grid(visible=False, axis="y")
        first = group[0]
        sample = "x".join(map(str, first.sample_shape))
        axes.set_title(
            f"{first.network} ({first.source}), batch {first.batch} of {sample}, {first.dtype}"
        )
    grid[-1].set_xlabel("ms a step")
    figure.align_ylabels()
    return figure
