"""The figures of one benchmark run: ratios, time and rate against size, networks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from speed.figures import (
    Plot,
    in_order,
    label_ends,
    legend,
    look,
    new_figure,
    no_ticks,
    number,
    ours,
    plain,
    plain_log_ticks,
    styled,
    times,
)
from speed.results import Measurement, NetworkMeasurement, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["plots_of"]

_MOST_BARS = 20  # works in one figure
_BAR = 0.66  # of a work's height that its bars fill
_DTYPES = ("float32", "bfloat16", "float16")


def plots_of(results: Results) -> Iterator[Plot]:
    """Every figure that a run has the numbers for."""
    for make in (_ratios, _sizes, _sweeps, _networks):
        yield from make(results)


def _describe(row: Measurement) -> str:
    """The work in few words."""
    words = [row.layer, "x".join(map(str, row.shape))]
    if row.groups:
        words.append(f"{row.groups} groups")
    if row.memory_format == "channels_last":
        words.append("channels_last")
    if row.method == "stream":
        words.append("with launches")
    return " ".join(words)


# Ratios


_WHAT = {
    ("noise", "full"): "forward + backward, training with noise",
    ("quiet", "full"): "forward + backward, training without noise",
    ("eval", "forward"): "forward, evaluation",
}


def _ratios(results: Results) -> Iterator[Plot]:
    for (mode, operation), what in _WHAT.items():
        rows = [
            row
            for row in results.select(mode=mode, operation=operation, status="ok")
            if row.ratio is not None and "sweep" not in row.suite and row.provider != row.peer
        ]
        rows = [row for row in rows if row.provider not in ("copy", "torch", "cudnn")]
        for dtype, mine in _groups_of_dtypes(rows):
            works = list(_by_work(mine).values())
            parts = [works[i : i + _MOST_BARS] for i in range(0, len(works), _MOST_BARS)]
            for number_, part in enumerate(parts, start=1):
                which = f", {number_} of {len(parts)}" if len(parts) > 1 else ""
                yield Plot(
                    f"ratio_{mode}_{dtype}" + (f"_{number_}" if number_ > 1 else ""),
                    f"Time relative to torch's layer: {what}, {dtype}{which}",
                    _ratio_figure([row for rows_ in part for row in rows_]),
                )


def _by_work(rows: Sequence[Measurement]) -> dict[tuple[object, ...], list[Measurement]]:
    """Rows to be compared; a work that two suites measured counts once."""
    works: dict[tuple[object, ...], dict[str, Measurement]] = {}
    for row in rows:
        works.setdefault(row.work, {}).setdefault(row.provider, row)
    return {work: list(found.values()) for work, found in works.items()}


def _reach(row: Measurement) -> tuple[float, float]:
    """The ratios of the percentiles."""
    median, low, high = times(row)
    scale = (row.ratio or math.nan) / median
    return scale * low, scale * high


def _whiskers(row: Measurement) -> list[list[float]]:
    """Distances from the ratio to those of the percentiles, as errorbar wants them."""
    low, high = _reach(row)
    ratio = row.ratio or math.nan
    return [[ratio - low], [high - ratio]]


def _draw_bar(axes: Any, y: float, row: Measurement, thickness: float) -> None:
    """From 1 to the ratio, with its number beyond the whisker."""
    ratio, colour = row.ratio or math.nan, look(row.provider).colour
    axes.barh(y, ratio - 1, 0.92 * thickness, left=1, color=colour, alpha=0.9)
    axes.errorbar(ratio, y, xerr=_whiskers(row), color="#222222", linewidth=1, capsize=2)
    slower = ratio >= 1
    axes.annotate(
        number(ratio), (_reach(row)[slower], y), (5 if slower else -5, 0), fontsize=9.5,
        textcoords="offset points", va="center", ha="left" if slower else "right", weight="bold",
        color=colour,
    )  # fmt: skip


def _draw_marker(axes: Any, y: float, row: Measurement) -> None:
    style = look(row.provider)
    axes.errorbar(
        row.ratio, y, xerr=_whiskers(row), color=style.colour, marker=style.marker, markersize=6.5,
        linewidth=1, markeredgecolor="white", markeredgewidth=0.5,
    )  # fmt: skip


@styled
def _ratio_figure(rows: Sequence[Measurement]) -> Figure:
    works = _by_work(rows)
    bars = max(1, max(sum(ours(row.provider) for row in group) for group in works.values()))
    figure, grid = new_figure(height=1.4 + 0.42 * len(works) * (1 + 0.45 * (bars - 1)))
    axes = grid[0, 0]
    lowest, highest = 1.0, 1.0
    for position, group in enumerate(works.values()):
        order = in_order(row.provider for row in group)
        mine = [provider for provider in order if ours(provider)]
        for row in group:
            if row.provider in mine:
                bar = mine.index(row.provider) - (bars - 1) / 2
                _draw_bar(axes, position + bar * _BAR / bars, row, _BAR / bars)
            else:
                _draw_marker(axes, position, row)
            below, above = _reach(row)
            lowest, highest = min(lowest, below), max(highest, above)
    axes.axvline(1, color="#1a1a1a", linewidth=1.4)
    axes.set_xscale("log")
    # Room for the numbers beside the bars, in proportion to what the axis spans.
    room = 1.25 * (highest / lowest) ** 0.12
    low, high = lowest / (1.35 if lowest == 1 else room), highest * room
    axes.set_xlim(low, high)
    plain_log_ticks(axes.xaxis, low, high)
    axes.set_yticks(
        range(len(works)), [_describe(group[0]) for group in works.values()], fontsize=9
    )
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.set_xlabel("time / torch's time (log scale; 1 = torch's layer)")
    legend(figure, (row.provider for row in rows), bars=True)
    return figure


# Time and rate against size


def _drawn(results: Results, **fields: object) -> list[Measurement]:
    return [r for r in results.select(status="ok", **fields) if r.gb_per_s]


def _copies(
    results: Results, rows: Sequence[Measurement], by_size: bool
) -> list[tuple[float, float]]:
    """(x, GB/s) of the device's copies of the same inputs."""
    found = {}
    for row in rows:
        for copy in results.select(
            provider="copy", status="ok", shape=row.shape, dtype=row.dtype,
            memory_format=row.memory_format, method=row.method,
        ):  # fmt: skip
            if copy.gb_per_s:
                found[float(row.elements if by_size else row.x_value)] = copy.gb_per_s
    return sorted(found.items())


def _lines(
    axes: Any, rows: Sequence[Measurement], y: Callable[[Measurement], tuple[float, float, float]],
    x: Callable[[Measurement], float], joined: bool,
) -> dict[str, tuple[float, float]]:  # fmt: skip
    """One line a provider with its percentiles; where each ends."""
    ends = {}
    for provider in reversed(in_order(row.provider for row in rows)):
        mine = sorted((row for row in rows if row.provider == provider), key=x)
        xs = [x(row) for row in mine]
        middle, low, high = zip(*map(y, mine), strict=True)
        style = look(provider)
        width = 2.4 if ours(provider) else 1.6
        axes.plot(
            xs, middle, color=style.colour, marker=style.marker, linewidth=width if joined else 0,
            markersize=5.5, markeredgecolor="white", markeredgewidth=0.6,
            zorder=3 if ours(provider) else 2,
        )  # fmt: skip
        if joined:
            axes.fill_between(xs, low, high, color=style.colour, alpha=0.16, linewidth=0)
        ends[provider] = (xs[-1], middle[-1])
    return ends


def _rate(row: Measurement) -> tuple[float, float, float]:
    return tuple(row.model_bytes / ms * 1e-6 for ms in times(row))  # type: ignore[return-value]


@styled
def _time_and_rate(
    results: Results, rows: Sequence[Measurement], x_name: str, joined: bool
) -> Figure:
    def x(row: Measurement) -> float:
        return float(row.x_value if joined else row.elements)

    figure, grid = new_figure(2, 1, height=7.2, sharex=True)
    time, rate = grid[0, 0], grid[1, 0]
    ends = _lines(time, rows, times, x, joined)
    rate_ends = _lines(rate, rows, _rate, x, joined)
    roof = _copies(results, rows, by_size=not joined)
    if roof:
        xs, ys = zip(*roof, strict=True)
        how = {"linestyle": (0, (5, 2))} if joined else {"linestyle": "", "marker": "_", "ms": 14}
        rate.plot(xs, ys, color=look("copy").colour, linewidth=1.5, **how)
        rate_ends["copy"] = (xs[-1], ys[-1])
    for axes, values in ((time, [times(r)[0] for r in rows]), (rate, [_rate(r)[0] for r in rows])):
        axes.set_xscale("log")
        axes.set_yscale("log")
        if axes is rate:
            values += [y for _, y in roof]
        low, high = min(values) / 1.5, max(values) * 1.5
        axes.set_ylim(low, high)
        plain_log_ticks(axes.yaxis, low, high, most=8)
    xs_all = sorted({x(row) for row in rows})
    if joined:
        rate.set_xticks(xs_all, [plain(v) for v in xs_all])
        rate.xaxis.set_minor_locator(no_ticks())
    else:
        rate.set_xlim(xs_all[0] / 1.6, xs_all[-1] * 1.6)
        plain_log_ticks(rate.xaxis, xs_all[0] / 1.6, xs_all[-1] * 1.6)
    time.set(title="Time", ylabel="ms a call (log scale)")
    rate.set(title="Rate, by the bytes of one read and one write a pass", ylabel="GB/s (log scale)")
    rate.set_xlabel(f"{x_name} (log scale)")
    if joined:
        label_ends(time, ends)
        label_ends(rate, rate_ends)
    else:
        copies = ["copy"] if roof else []
        legend(figure, [*(row.provider for row in rows), *copies])
    return figure


def _groups_of_dtypes(rows: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement]]]:
    for dtype in _DTYPES:
        mine = [row for row in rows if row.dtype == dtype]
        if mine:
            yield dtype, mine


def _sizes(results: Results) -> Iterator[Plot]:
    """Everything outside the sweeps over its number of elements."""
    rows = [
        row
        for row in _drawn(results, mode="noise", operation="full")
        if "sweep" not in row.suite and row.provider != "copy"
    ]
    for dtype, mine in _groups_of_dtypes(rows):
        if len({row.elements for row in mine}) > 1:
            yield Plot(
                f"size_{dtype}",
                f"Every layer by its size, {dtype}",
                _time_and_rate(results, mine, "elements", joined=False),
            )


def _sweeps(results: Results) -> Iterator[Plot]:
    suites = dict.fromkeys(row.suite for row in results.measurements if "sweep" in row.suite)
    for suite in suites:
        rows = [
            row
            for row in _drawn(results, suite=suite, mode="noise", operation="full")
            if row.provider != "copy" and row.memory_format == "contiguous"
        ]
        for dtype, mine in _groups_of_dtypes(rows):
            if len({row.x_value for row in mine}) < 2:
                continue
            first = mine[0]
            sizes = [
                "·" if len({row.shape[i] for row in mine}) > 1 else str(size)
                for i, size in enumerate(first.shape)
            ]
            yield Plot(
                f"{suite.replace(' ', '_')}_{dtype}",
                f"{first.layer} {'x'.join(sizes)} against {first.x_name}, {dtype}",
                _time_and_rate(results, mine, first.x_name, joined=True),
            )


# Networks


def _networks(results: Results) -> Iterator[Plot]:
    rows = [row for row in results.networks if row.status == "ok"]
    if rows:
        yield Plot(
            "networks",
            "Training steps of whole networks",
            _network_figure(rows),
        )


@styled
def _network_figure(rows: Sequence[NetworkMeasurement]) -> Figure:
    works: dict[tuple[object, ...], list[NetworkMeasurement]] = {}
    for row in rows:
        works.setdefault(row.work, []).append(row)
    figure, grid = new_figure(len(works), 1, height=0.9 + 0.5 * (len(rows) + 1.6 * len(works)))
    for axes, group in zip(grid[:, 0], works.values(), strict=True):
        top = max(times(row)[2] for row in group)
        for i, row in enumerate(group):
            style, (median, low, high) = look(row.provider), times(row)
            whiskers = [[median - low], [high - median]]
            axes.barh(i, median, 0.62, color=style.colour, alpha=0.9)
            axes.errorbar(median, i, xerr=whiskers, color="#444444", linewidth=1, capsize=2)
            text = f"{row.rate:,.0f} {row.unit}/s" if row.rate else ""
            if row.ratio is not None and row.provider != row.peer:
                text += f", {number(row.ratio)}x"
            axes.annotate(
                text, (high, i), (6, 0), textcoords="offset points",
                va="center", fontsize=9, color=style.colour,
            )  # fmt: skip
        names = [f"{row.norm}\n{look(row.provider).label}" for row in group]
        axes.set_yticks(range(len(group)), names, fontsize=9)
        axes.set_ylim(len(group) - 0.4, -0.6)
        axes.set_xlim(0, 1.35 * top)
        axes.grid(visible=False, axis="y")
        first = group[0]
        sample = "x".join(map(str, first.sample_shape))
        axes.set_title(
            f"{first.network} ({first.source}), batch {first.batch} of {sample}, {first.dtype}"
        )
    grid[-1, 0].set_xlabel("ms a step")
    figure.align_ylabels()
    return figure
