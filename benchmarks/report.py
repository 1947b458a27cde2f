"""Stored results of ``bench.py`` as PNG plots, Markdown, or a README's performance section.

``python benchmarks/report.py RESULT... [--png FOLDER] [--markdown FILE] [--readme FILE]``
"""

import argparse
import sys
from pathlib import Path

from normnorm.cli import execute


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="report.py", description="Renders stored results.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULT", help="JSON of bench.py")
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
    from speed.main import report  # needs the packages of the extra

    return report(args)


if __name__ == "__main__":
    sys.exit(execute(parser()))
