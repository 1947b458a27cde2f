"""The benchmark: what normality normalization costs beside what one would use instead.

``normnorm bench`` measures, ``normnorm bench compare`` sets two result files beside each other.

* :mod:`~normnorm.bench.work`: what is measured; :mod:`~normnorm.bench.providers`: who does it;
* :mod:`~normnorm.bench.case`: inputs, and the float64 reference that each provider must match;
* :mod:`~normnorm.bench.timing`: medians of calls in alternation, on a CPU or a GPU;
* :mod:`~normnorm.bench.measure`, :mod:`~normnorm.bench.networks`: one work, one network;
* :mod:`~normnorm.bench.results`: the result file and its schema;
* :mod:`~normnorm.bench.tables`, :mod:`~normnorm.bench.compare`: text;
  :mod:`~normnorm.bench.plots`: PNG plots; :mod:`~normnorm.bench.report`: both from stored results.

Importing this package needs torch alone; what it runs with is looked for in :func:`run`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from normnorm.commands import CommandError

__all__ = ["add_arguments", "missing_packages", "run"]

# Needed beside torch, and for plots beside that.
_EXTRAS = ("msgspec", "tabulate", "tqdm")
_PLOT_EXTRAS = ("matplotlib",)


def missing_packages(*names: str) -> list[str]:
    """Which of these packages are not installed."""
    return [name for name in names if find_spec(name) is None]


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number


def _seconds(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0; got {text!r}")
    return number


def _shape(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"must be sizes joined by x, such as 32x64x56x56; got {text!r}"
        ) from None


def _add_selection(parser: argparse.ArgumentParser) -> None:
    select = parser.add_argument_group("what is measured")
    size = select.add_mutually_exclusive_group()
    size.add_argument(
        "--quick", action="store_true",
        help="three shapes, no compilation, two small networks: within a minute on two cores",
    )  # fmt: skip
    size.add_argument("--full", action="store_true", help="every shape, dtype and provider: hours")
    some: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    select.add_argument("--layers", **some, help="layer classes, such as BatchNormalNorm2d")
    select.add_argument(
        "--shape", nargs="+", type=_shape, metavar="NxCxHxW",
        help="inputs of these shapes instead of the preset's",
    )  # fmt: skip
    select.add_argument("--suites", **some, help="parts of the preset, such as resnet or small")
    select.add_argument("--dtype", **some, help="float32, bfloat16, float16")
    select.add_argument("--memory-format", **some, help="contiguous, channels_last")
    select.add_argument(
        "--modes", **some, help="noise (training), quiet (training without noise), eval"
    )
    select.add_argument("--operations", **some, help="forward, backward, full")
    select.add_argument("--providers", **some, help="who takes part; an unknown name lists them")
    select.add_argument(
        "--networks", nargs="*", metavar="NAME",
        help="train these networks (without names: the preset's), and measure layers only if a "
        "layer, shape or suite is named too",
    )  # fmt: skip
    select.add_argument("--no-networks", action="store_true", help="layers alone")
    select.add_argument(
        "--callgrind", action="store_true",
        help="count the instructions of the CPU kernels too (needs valgrind and a C++ compiler)",
    )  # fmt: skip


def _add_method(parser: argparse.ArgumentParser) -> None:
    method = parser.add_argument_group("how")
    method.add_argument("--device", help="cpu or cuda (default: cuda where there is one)")
    method.add_argument("--threads", type=_positive, metavar="N", help="torch's threads")
    method.add_argument(
        "--budget", type=_seconds, metavar="SECONDS",
        help="time for the samples of one operation, all providers together (default: 1.5; "
        "0.4 with --quick, 3 with --full; 0.4 times that on a GPU)",
    )  # fmt: skip
    method.add_argument("--seed", type=int, default=20250505, help="of the random inputs")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the benchmark's options and its ``compare`` to a parser or subparser."""
    _add_selection(parser)
    _add_method(parser)
    out = parser.add_argument_group("files")
    out.add_argument("--json", type=Path, metavar="FILE", help="everything, environment included")
    out.add_argument("--csv", type=Path, metavar="FILE", help="layers, in Liger's columns")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="the tables")
    out.add_argument("--png", type=Path, metavar="FOLDER", help="the plots, a file each")
    # Otherwise argparse shows a page of options, and the comparison as if it were required.
    parser.usage = f"{parser.prog} [options]\n       {parser.prog} compare A.json B.json"
    actions = parser.add_subparsers(dest="action", metavar="compare", prog=parser.prog)
    compare = actions.add_parser(
        "compare", help="what became slower between two result files, with the noise beside it"
    )
    compare.add_argument("before", type=Path, metavar="A.json")
    compare.add_argument("after", type=Path, metavar="B.json")


def run(args: argparse.Namespace) -> int:
    """Measures, or compares; the exit status.

    Args:
        args: what a parser with :func:`add_arguments` returned.

    Returns:
        0; 1 where a provider failed or gave wrong numbers, or something became slower. A sentence
        on stderr says which.

    Raises:
        CommandError: something cannot be measured, read or written, or a package is missing.
        KeyboardInterrupt: with what is kept, and where.
    """
    missing = missing_packages(*_EXTRAS, *(_PLOT_EXTRAS if args.png else ()))
    if missing:
        raise CommandError(f'needs {", ".join(missing)}: pip install "normnorm[bench]"')
    from normnorm.bench.main import bench, compare

    return compare(args) if args.action == "compare" else bench(args)
