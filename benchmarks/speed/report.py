"""Stored results as PNG plots, as Markdown, or as the performance section of a README."""

from __future__ import annotations

import argparse
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from speed.results import Results

__all__ = ["parser", "write_plots"]


def write_plots(runs: Sequence[Results], folder: str | os.PathLike[str]) -> list[Path]:
    """Writes every plot of every run as PNG; with several runs, their numbers lead the names.

    Returns:
        The files, in order.

    Raises:
        ResultsError: the folder cannot be made or written to.
    """
    from speed.figures import save_figure
    from speed.plots import plots_of
    from speed.results import ResultsError, write_atomically

    target = Path(folder)
    try:
        target.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResultsError(f"cannot write to {folder}: {error.strerror or error}") from None
    written = []
    for number, results in enumerate(runs, start=1):
        for plot in plots_of(results):
            out = io.BytesIO()
            save_figure(plot, out)
            prefix = f"{number}_" if len(runs) > 1 else ""
            written.append(target / f"{prefix}{plot.name}.png")
            write_atomically(written[-1], out.getvalue())
    return written


def parser() -> argparse.ArgumentParser:
    """The report's options, for :func:`normnorm.commands.execute`."""
    parser = argparse.ArgumentParser(prog="report.py", description="Renders stored results.")
    parser.add_argument(
        "results", nargs="+", type=Path, metavar="RESULT", help="JSON of bench.py"
    )
    out = parser.add_argument_group("what to write (at least one)")
    out.add_argument("--png", type=Path, metavar="FOLDER", help="the plots, a file each")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="all tables")
    out.add_argument(
        "--readme", type=Path, metavar="FILE",
        help="largest inputs only, between the performance markers of this file",
    )  # fmt: skip
    parser.set_defaults(run=_run, extra="bench")
    return parser


def _run(args: argparse.Namespace) -> int:
    """Renders; the exit status, 0.

    Raises:
        CommandError: something cannot be read or written.
    """
    for path in _render(args):
        print(f"wrote {path}")
    return 0


def _render(args: argparse.Namespace) -> list[Path]:
    """Everything is read before anything is written."""
    from speed import tables
    from speed.results import ResultsError, load, write_atomically

    if not (args.png or args.markdown or args.readme):
        raise ResultsError("nothing to write: give --png, --markdown or --readme")
    runs = [load(path) for path in args.results]
    texts: dict[Path, str] = {}
    if args.readme is not None:
        try:
            before = args.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResultsError(f"cannot read {args.readme}: {reason}") from None
        section = tables.readme_section(args.results, args.readme.parent)
        texts[args.readme] = tables.with_section(before, section, str(args.readme))
    if args.markdown is not None:
        texts[args.markdown] = "\n".join(map(tables.markdown, runs))
    for path, text in texts.items():
        write_atomically(path, text)
    return [*texts, *(write_plots(runs, args.png) if args.png is not None else ())]
