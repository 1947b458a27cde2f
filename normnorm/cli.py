"""The command line: ``normnorm COMMAND`` or ``python -m normnorm COMMAND``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import normnorm
from normnorm import doctor, gradcheck
from normnorm.commands import execute

__all__ = ["main"]

_COMMANDS = {
    "doctor": (doctor, "versions, backends, and a check of each against the reference"),
    "gradcheck": (gradcheck, "gradients of every layer, backend and dtype"),
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="normnorm", description="Normality normalization for PyTorch."
    )
    parser.add_argument("--version", action="version", version=normnorm.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run, program=command.prog)
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status (:func:`normnorm.commands.execute`)."""
    return execute(_parser(), arguments)
