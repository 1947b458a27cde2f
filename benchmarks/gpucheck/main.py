"""The command line of ``gpu_check.py``."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from gpucheck import runner, summary
from gpucheck.record import Record, Unwritable
from gpucheck.stage import ROOT

__all__ = ["main"]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description="Build, test and measure normnorm on this machine's GPU."
    )
    parser.add_argument(
        "--results", type=Path, metavar="DIR",
        help="folder for gpu_check.json, .md and .log (default benchmarks/results, in a dry run "
        "runs/gpu-check)",
    )  # fmt: skip
    parser.add_argument(
        "--dry", action="store_true", help="without a GPU: kernels run on the CPU, tiny inputs"
    )
    parser.add_argument(
        "--stages", metavar="NAME,NAME", default=None,
        help=f"only these of {', '.join(s.name for s in runner.STAGES)}",
    )  # fmt: skip
    return parser


def _chosen(names: str | None, parser: argparse.ArgumentParser) -> Sequence[runner.Stage]:
    if names is None:
        return runner.STAGES
    known = {stage.name: stage for stage in runner.STAGES}
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            parser.error(f"--stages: '{name}' is none of {', '.join(known)}")
    if not wanted:
        parser.error("--stages names no stage")
    return [stage for stage in runner.STAGES if stage.name in wanted]


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """0: every stage passed or was unavailable; 1: one failed; 2: it could not begin;
    130: it was interrupted."""
    parser = _parser()
    options = parser.parse_args(arguments)
    stages = _chosen(options.stages, parser)
    reason = None if options.dry else runner.why_not_begin()
    if reason is not None:
        print(reason, file=sys.stderr)
        return 2
    default = ROOT / ("runs/gpu-check" if options.dry else "benchmarks/results")
    try:
        record = Record((options.results or default).resolve(), options.dry)
    except Unwritable as sentence:
        print(sentence, file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, _interrupt)  # as from the keyboard: the record is closed
    interrupted = False
    try:
        runner.run_stages(record, options.dry, stages)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted; what was found so far is kept", flush=True)
    passed = record.finish()
    passed = summary.write(record) and passed
    print(summary.text(record.data), flush=True)
    print(f"\nrecord: {record.path}", flush=True)
    if interrupted:
        return 130
    return 0 if passed else 1
