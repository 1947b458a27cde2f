"""How near each of our kernels comes to what memory and arithmetic allow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from normnorm.bench.report.figures import Plot, legend, new_figure, plain_log_ticks, styled
from normnorm.bench.report.style import GREY, in_order, look, ours
from normnorm.bench.results import Measurement, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Column", "columns", "roofline"]

_FEWEST_SHAPES = 3  # fewer do not tell a roof from a kernel
_MODES = ("noise", "quiet", "eval")
_NAMES = {"noise": "with noise", "quiet": "without noise", "eval": "evaluation"}
_TORCH = ("torch", "cudnn")


class Column(NamedTuple):
    """One operation, mode and dtype with its roofs, in 1e9 elements a second.

    Attributes:
        name: what it is.
        rows: ours and torch's, of every shape.
        memory: what the fastest copy of this run allows at the operation's bytes an element.
        arithmetic: what instructions allow; None where that is not known.
        counted: whether ``arithmetic`` comes from counted instructions and the device's clock;
            else it is the highest rate that one of our kernels reached at any shape.
    """

    name: str
    rows: list[Measurement]
    memory: float | None
    arithmetic: float | None
    counted: bool


def _rate(row: Measurement) -> float:
    assert row.median_ms
    return row.elements / row.median_ms * 1e-6


def _counted(results: Results, rows: list[Measurement]) -> float | None:
    """What the counted instructions allow, every lane busy in every clock."""
    for row in rows:
        share = results.share_of_issue(row)
        if share:
            return _rate(row) / share
    return None


def columns(results: Results) -> Iterator[Column]:
    """Every operation that one of our backends was measured at."""
    # Beside counted instructions, rates that were only reached would be no roof.
    any_counted = any(count.isa.startswith("sm_") for count in results.counts)
    copies = [row.gb_per_s for row in results.select(provider="copy", status="ok") if row.gb_per_s]
    for dtype in dict.fromkeys(row.dtype for row in results.measurements):
        for operation in ("forward", "backward"):
            for mode in _MODES:
                rows = [
                    row
                    for row in results.select(
                        dtype=dtype, operation=operation, mode=mode, status="ok"
                    )
                    if row.suite != "small" and (ours(row.provider) or row.provider in _TORCH)
                ]
                mine = [row for row in rows if ours(row.provider)]
                if not mine:
                    continue
                per_element = mine[0].model_bytes / mine[0].elements
                counted = _counted(results, mine)
                enough = len({row.shape for row in mine}) >= _FEWEST_SHAPES
                best = max(map(_rate, mine)) if enough and not any_counted else None
                words = [operation, _NAMES[mode], f"{per_element:g} B an element"]
                yield Column(
                    "\n".join(words), rows, max(copies) / per_element if copies else None,
                    counted or best, counted is not None,
                )  # fmt: skip


def roofline(results: Results) -> Iterator[Plot]:
    """The figure, where one of our backends was measured."""
    found = list(columns(results))
    if not found:
        return
    how = (
        "its instructions at the highest clock"
        if any(column.counted for column in found)
        else "the highest rate that one of our kernels reached at any size, small ones in cache"
    )
    yield Plot(
        "roofline",
        "Roofline: what memory and arithmetic allow",
        "A marker is one layer and shape. Solid: the roof of memory, by the fastest device copy of "
        f"this run and the bytes of one read and one write a pass. Dashed: the roof of arithmetic, "
        f"by {how}. A kernel cannot be above both.",
        _figure(found),
    )


@styled
def _figure(found: list[Column]) -> Figure:
    """A row of axes for each dtype."""
    by_dtype: dict[str, list[Column]] = {}
    for column in found:
        by_dtype.setdefault(column.rows[0].dtype, []).append(column)
    widest = max(map(len, by_dtype.values()))
    figure, grid = new_figure(
        len(by_dtype), 1, height=0.6 + 3.9 * len(by_dtype), width=max(7.6, 1.5 * widest)
    )
    for axes, (dtype, columns_) in zip(grid[:, 0], by_dtype.items(), strict=True):
        _draw(axes, columns_)
        if len(by_dtype) > 1:
            axes.set_title(dtype)
    legend(figure, [row.provider for column in found for row in column.rows])
    return figure


def _draw(axes: Any, found: list[Column]) -> None:
    values = []
    for position, column in enumerate(found):
        values += _draw_kernels(axes, position, column.rows)
        for roof, word, dashes, end in (
            (column.memory, "memory", "-", 0.42),
            (column.arithmetic, "arithmetic", (0, (4, 2)), -0.42),
        ):
            if roof is None:
                continue
            values.append(roof)
            axes.plot(
                [position - 0.42, position + 0.42], [roof, roof], color=GREY, linestyle=dashes,
                linewidth=1.8,
            )  # fmt: skip
            axes.annotate(
                f"{word} {roof:.0f}" if roof >= 10 else f"{word} {roof:.2g}",
                (position + end, roof), (0, 3), textcoords="offset points", fontsize=8, color=GREY,
                ha="right" if end > 0 else "left",
            )  # fmt: skip
    low, high = min(values) / 1.4, max(values) * 1.5
    axes.set_yscale("log")
    axes.set_ylim(low, high)
    plain_log_ticks(axes.yaxis, low, high)
    axes.set_xticks(range(len(found)), [column.name for column in found], fontsize=8.5)
    axes.set_xlim(-0.6, len(found) - 0.4)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel("1e9 elements a second (log scale)")


def _draw_kernels(axes: Any, position: int, rows: list[Measurement]) -> list[float]:
    """Each provider's rates beside those of the others; all of them."""
    providers = in_order(row.provider for row in rows)
    values = []
    for i, provider in enumerate(providers):
        x = position + 0.24 * (i - (len(providers) - 1) / 2)
        rates = [_rate(row) for row in rows if row.provider == provider]
        values += rates
        style = look(provider)
        axes.scatter(
            [x] * len(rates), rates, s=26, color=style.colour, marker=style.marker, alpha=0.75,
            edgecolor="white", linewidth=0.5, zorder=3,
        )  # fmt: skip
    return values
