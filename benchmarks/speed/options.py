"""The command line of the benchmark: ``python benchmarks/bench.py --help``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

__all__ = ["parser"]


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


def parser() -> argparse.ArgumentParser:
    """The benchmark's options and its ``compare``, for :func:`normnorm.commands.execute`."""
    parser = argparse.ArgumentParser(
        prog="bench.py", description="Times every layer beside torch's, compiled and copied."
    )
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
    parser.set_defaults(run=_run, extra="bench")
    return parser


def _run(args: argparse.Namespace) -> int:
    from speed.main import bench, compare

    return compare(args) if args.action == "compare" else bench(args)
