"""The demonstration: networks trained on real data, plain and normality normalization side by side.

``normnorm demo`` trains a small convolutional net with BatchNorm and with BatchNormalNorm, and a
small transformer with LayerNorm and with LayerNormalNorm: same initialization, same data, same
order of the data. It prints a table, draws a plot, writes the numbers, and judges them.

Importing this package needs torch alone; what it runs with is looked for in :func:`run`.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from normnorm.commands import CommandError

__all__ = ["add_arguments", "run"]

# Module names, and what pip calls their distributions.
_EXTRAS = {"matplotlib": "matplotlib", "sklearn": "scikit-learn", "tqdm": "tqdm"}


def _positive(text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1; got {text!r}")
    return number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the demonstration's options to a parser or subparser."""
    parser.add_argument(
        "--dataset", choices=("digits", "cifar10"), default="digits",
        help="digits: scikit-learn's handwritten digits, nothing to download (default); "
        "cifar10: through torchvision, from --data-dir; long without compiled kernels",
    )  # fmt: skip
    parser.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="folder of CIFAR-10 (default: data)"
    )
    parser.add_argument(
        "--epochs", type=_positive, metavar="N",
        help="passes over the training data, both networks (default: the recipe's)",
    )  # fmt: skip
    parser.add_argument(
        "--seeds", type=_positive, metavar="N",
        help="seeds to average over, 0 to N - 1 (default: 5 for digits, 1 for cifar10)",
    )  # fmt: skip
    parser.add_argument(
        "--threads", type=_positive, metavar="N",
        help="torch's threads (default: 1 for digits, torch's choice for cifar10)",
    )  # fmt: skip
    parser.add_argument(
        "--quick", action="store_true",
        help="one epoch and one seed unless said otherwise, and no judgement of the accuracies",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, metavar="DIR",
        help="folder for the plot and the numbers (default: runs/demo-<date>-<time>)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Runs the demonstration; the exit status.

    Args:
        args: what a parser with :func:`add_arguments` returned.

    Returns:
        0; 1 where an accuracy falls short (:func:`normnorm.demo.results.judge`), which a sentence
        on stderr says.

    Raises:
        CommandError: a package, the data or the folder for the results cannot be had.
    """
    missing = [name for module, name in _EXTRAS.items() if find_spec(module) is None]
    if missing:
        raise CommandError(f'needs {", ".join(missing)}: pip install "normnorm[demo]"')
    from normnorm.demo.main import compare

    return compare(args)
