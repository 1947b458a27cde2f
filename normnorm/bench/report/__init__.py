"""Renders stored results again: one HTML page, PNG plots, Markdown, the README's section.

``normnorm report RESULT...`` takes results of ``normnorm bench`` and studies of
``benchmarks/scaling.py``, of one machine or of several.

* :mod:`~normnorm.bench.report.sources`: what is reported;
* :mod:`~normnorm.bench.report.plots`, :mod:`~normnorm.bench.report.roofline`,
  :mod:`~normnorm.bench.report.growth`: figures; :mod:`~normnorm.bench.report.tables`: tables;
* :mod:`~normnorm.bench.report.html`, :mod:`~normnorm.bench.report.markdown`: what holds them.

Importing this package needs torch alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from normnorm.bench import missing_packages

if TYPE_CHECKING:
    from normnorm.bench.report.sources import Sources
    from normnorm.bench.results import Results

__all__ = ["add_arguments", "run", "write_html", "write_plots"]

_EXTRAS = ("jinja2", "matplotlib", "msgspec", "numpy", "scipy", "tabulate", "tqdm")
_DEFAULT = Path("report.html")


def write_html(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes one run's results as one self-contained page, whole or not at all.

    Raises:
        ResultsError: it cannot be written there; what stood there is unchanged.
    """
    from normnorm.bench.report.html import render_html
    from normnorm.bench.report.sources import Source, Sources
    from normnorm.bench.results import write_atomically

    write_atomically(path, render_html(Sources(runs=[Source(None, results)])))


def write_plots(sources: Sources, folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every plot as PNG; with several files, their numbers lead the names.

    Returns:
        The files, in order.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    import io

    from normnorm.bench.report.figures import save_figure
    from normnorm.bench.report.growth import growth_plots
    from normnorm.bench.report.plots import plots_of
    from normnorm.bench.results import ResultsError, write_atomically

    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from None
    groups = [
        *(plots_of(run.results) for run in sources.runs),
        *(growth_plots(study) for _, study in sources.studies),
    ]
    written = []
    for number, plots in enumerate(groups, start=1):
        for plot in plots:
            out = io.BytesIO()
            save_figure(plot, out, "png")
            prefix = f"{number}_" if len(groups) > 1 else ""
            written.append(target / f"{prefix}{plot.name}.png")
            write_atomically(written[-1], out.getvalue())
    return written


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the report's options to a parser or subparser."""
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT",
        help="JSON of normnorm bench or of benchmarks/scaling.py",
    )  # fmt: skip
    parser.add_argument(
        "--html", type=Path, metavar="FILE",
        help=f"everything on one page (default, if nothing else is asked for: {_DEFAULT})",
    )  # fmt: skip
    parser.add_argument("--png", type=Path, metavar="FOLDER", help="the plots, a file each")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="the tables in short")
    parser.add_argument(
        "--readme", type=Path, metavar="FILE",
        help="the same, put between the performance markers of this file",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Renders; the exit status.

    Args:
        args: what a parser with :func:`add_arguments` returned.

    Returns:
        0, or 2 where something could not be read or written: a sentence on stderr says what.
    """
    missing = missing_packages(*_EXTRAS)
    if missing:
        print(
            f'normnorm report needs {", ".join(missing)}: pip install "normnorm[bench]"',
            file=sys.stderr,
        )
        return 2
    from normnorm.bench.results import ResultsError

    try:
        for path in _render(args):
            print(f"wrote {path}")
    except ResultsError as error:
        print(f"normnorm report: {error}", file=sys.stderr)
        return 2
    return 0


def _render(args: argparse.Namespace) -> list[Path]:
    """Everything is read before anything is written."""
    from normnorm.bench.report.html import render_html
    from normnorm.bench.report.markdown import render_markdown, with_section
    from normnorm.bench.report.sources import read
    from normnorm.bench.results import ResultsError, write_atomically

    sources = read(args.results)
    texts: dict[Path, str] = {}
    if args.readme is not None:
        try:
            before = args.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResultsError(f"cannot read {args.readme}: {reason}") from None
        section = render_markdown(sources, args.readme.parent)
        texts[args.readme] = with_section(before, section, str(args.readme))
    if args.markdown is not None:
        texts[args.markdown] = render_markdown(sources, args.markdown.parent) + "\n"
    if args.html is not None or not (texts or args.png):
        texts[args.html or _DEFAULT] = render_html(sources)
    written = []
    for path, text in texts.items():
        write_atomically(path, text)
        written.append(path)
    if args.png is not None:
        written += write_plots(sources, args.png)
    return written
