"""Shared by the scripts that measure one thing: the output option, and a file of rows with their
environment."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from speed import environment
from speed.results import ResultsError, json_text, write_atomically

RESULTS = Path(__file__).resolve().parent / "results"
FORMATS = ("contiguous", "channels_last")
SEED = 0


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, metavar="FILE", help="in place of results/*.json")


def run(
    name: str,
    options: argparse.Namespace,
    measure: Callable[[], list[Any]],
    table: Callable[[list[Any]], str],
) -> int:
    """Measures, writes the rows (dataclasses) and their environment, prints the table; the exit
    status. The file's format is ``normnorm-<name>``, its default path ``<name>_<device type>.json``
    in :data:`RESULTS`."""
    device = torch.device(getattr(options, "device", "cpu"))
    torch.manual_seed(SEED)
    start, clock = environment.before(device, SEED), time.perf_counter()
    rows = measure()
    data = {
        "format": f"normnorm-{name}",
        "version": 1,
        "environment": environment.after(start, device, time.perf_counter() - clock),
        "rows": rows,
    }
    output = options.output or RESULTS / f"{name}_{device.type}.json"
    try:
        write_atomically(output, json_text(data, indent=2))
    except ResultsError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    print(table(rows))
    print(f"wrote {output}")
    return 0
