"""Shared by the scripts that measure one thing: options, and a file of rows with their
environment."""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from normnorm.cli import execute
from speed import environment
from speed.results import json_text, write_atomically
from speed.timing import Call, interleaved

RESULTS = Path(__file__).resolve().parent / "results"
SEED = 0
Row = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    made.add_argument("--output", type=Path, metavar="FILE", help="in place of results/*.json")
    return made


def path(name: str, options: argparse.Namespace) -> Path:
    device = torch.device(getattr(options, "device", "cpu"))
    return options.output or RESULTS / f"{name}_{device.type}.json"


def timed(
    calls: Mapping[str, Call], device: torch.device, budget_s: float, copies: int = 1, **about: Any
) -> list[Row]:
    """A row for each way to do the same: its name, torch's threads, its timing and ``about``.
    Raises whatever one of the calls raised."""
    rows = []
    for way, timing in interleaved(
        calls, device, copies=copies, budget_s=budget_s, min_rounds=9
    ).items():
        if isinstance(timing, Exception):
            raise timing
        rows.append({**about, "way": way, "threads": torch.get_num_threads(), "timing": timing})
    return rows


def stored(file: Path) -> list[Row]:
    """The rows of a file; none where there is no file."""
    return json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []


def main(
    name: str,
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Row]],
    table: Callable[[list[Row]], str],
) -> int:
    """Measures, writes the rows and their environment, prints the table; the exit status. The
    file's format is ``normnorm-<name>``."""

    def run(options: argparse.Namespace) -> int:
        device = torch.device(getattr(options, "device", "cpu"))
        torch.manual_seed(SEED)
        start, clock = environment.before(device, SEED), time.perf_counter()
        rows = measure(options)
        data = {
            "format": f"normnorm-{name}",
            "version": 1,
            "environment": environment.after(start, device, time.perf_counter() - clock),
            "rows": rows,
        }
        write_atomically(path(name, options), json_text(data, indent=2))
        print(table(rows))
        print(f"wrote {path(name, options)}")
        return 0

    parser.set_defaults(run=run, extra="bench")
    return execute(parser)
