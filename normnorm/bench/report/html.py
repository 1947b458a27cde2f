"""One self-contained page: environment, plots, tables; nothing is fetched from anywhere."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import normnorm
from normnorm.bench.report import tables
from normnorm.bench.report.figures import Plot, save_figure
from normnorm.bench.report.growth import growth_plots
from normnorm.bench.report.plots import plots_of
from normnorm.bench.report.sources import Source, Sources
from normnorm.bench.report.tables import Table

__all__ = ["render_html"]

_PAGE = Path(__file__).resolve().parent / "page"
TITLE = "normnorm: the cost of normality normalization"


@dataclass(frozen=True)
class _Embedded:
    """A plot as the page holds it."""

    title: str
    caption: str
    model: bool
    uri: str
    width: int
    height: int


def _embedded(plot: Plot) -> _Embedded:
    """As SVG, which stays sharp at any size, in an image of its own: its ids meet no other's."""
    out = io.BytesIO()
    save_figure(plot, out, "svg")
    width, height = (round(96 * inches) for inches in plot.figure.get_size_inches())
    uri = "data:image/svg+xml;base64," + base64.b64encode(out.getvalue()).decode()
    return _Embedded(plot.title, plot.caption, plot.model, uri, width, height)


@cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PAGE), autoescape=True, trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    return environment.get_template("report.html.j2")


def _identifier(name: str, number: int) -> str:
    return f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-') or 'machine'}-{number}"


def _busy(run: Source) -> str | None:
    """The load average at the start, where other work can have disturbed the times."""
    around = run.environment
    load = around.load_before
    return f"{load:.1f}" if load is not None and load > 0.5 * around.cores else None


def _machines(sources: Sources) -> Iterator[dict[str, Any]]:
    for number, (run, name) in enumerate(zip(sources.runs, sources.names(), strict=True)):
        results = run.results
        yield {
            "id": _identifier(name, number),
            "name": name,
            "complete": results.complete,
            "busy": _busy(run),
            "problems": results.problems,
            "environment": list(tables.environment_lines(run.environment)),
            "summary": tables.summary(results),
            "plots": [_embedded(plot) for plot in plots_of(results)],
            "networks": tables.network_table(results.networks),
            "counts": tables.counts_table(results.counts),
        }


def _studies(sources: Sources) -> Iterator[dict[str, Any]]:
    for number, (_, study) in enumerate(sources.studies):
        around = study.environment
        yield {
            "id": f"growth-{number}",
            "name": around.device_name,
            "environment": list(tables.environment_lines(around)),
            "plots": [_embedded(p) for p in growth_plots(study) if p.name != "several_gpus"],
            "sweeps": tables.sweep_table(study.sweeps),
            "collectives": tables.collectives_table(study.collectives),
        }


def _model(sources: Sources) -> _Embedded | None:
    """Once, where a study supports it."""
    for _, study in sources.studies:
        for plot in growth_plots(study):
            if plot.name == "several_gpus":
                return _embedded(plot)
    return None


def _all_measurements(sources: Sources) -> tuple[Table, list[tuple[str, str]]]:
    """Every row of every run, and apart from them the columns that say the same in all rows."""
    parts = [
        tables.measurement_table(run.results, name)
        for run, name in zip(sources.runs, sources.names(), strict=True)
    ]
    if not parts:
        return Table((), [], 0), []
    head, _, words = parts[0]
    rows = [row for part in parts for row in part.rows]
    same = [i for i in range(words) if len({row[i] for row in rows}) == 1 and head[i] != "layer"]
    kept = [i for i in range(len(head)) if i not in same]
    table = Table(
        tuple(head[i] for i in kept), [tuple(row[i] for i in kept) for row in rows],
        words - len(same),
    )  # fmt: skip
    return table, [(head[i], rows[0][i]) for i in same] if rows else []


def _files(paths: Iterable[Path | None]) -> str:
    return ", ".join(path.name if path else "a run just ended" for path in paths)


def render_html(sources: Sources) -> str:
    """The page's text.

    Needs matplotlib, NumPy and Jinja2 (torch's own requirement).
    """
    from markupsafe import Markup

    paths = [*(run.path for run in sources.runs), *(path for path, _ in sources.studies)]
    measurements, same = _all_measurements(sources)
    page: str = _template().render(
        title=TITLE,
        css=Markup((_PAGE / "report.css").read_text(encoding="utf-8")),
        script=Markup((_PAGE / "report.js").read_text(encoding="utf-8")),
        machines=list(_machines(sources)),
        across=tables.across(
            [(n, run.results) for n, run in zip(sources.names(), sources.runs, strict=True)]
        ),
        studies=list(_studies(sources)),
        model=_model(sources),
        parameters=tables.parameter_table(),
        measurements=measurements,
        same=same,
        version=normnorm.__version__,
        files=_files(paths),
    )
    return page
