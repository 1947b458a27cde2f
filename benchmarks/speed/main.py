"""``bench.py``: measures a plan under a progress bar, keeps what it has, says what failed."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from speed import environment
from speed.compare import changes, report
from speed.machine_code import cuda_counts
from speed.measure import measure, sentence
from speed.networks import measure_network
from speed.plan import Plan, UsageError, make_plan
from speed.report import write_plots
from speed.results import (
    Measurement,
    NetworkMeasurement,
    Results,
    ResultsError,
    load,
    save,
    write_atomically,
)
from speed.tables import csv_text, markdown, text, work_name

__all__ = ["UsageError", "bench", "compare"]


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    """That many of torch's threads inside; afterwards those of before."""
    before = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _partial(path: Path) -> Path:
    """Where results go while the run is on: what stands at ``path`` stays until it is over."""
    return path.with_name(path.name + ".partial")


class _Run:
    """A run in progress: its results so far, on disk too where a JSON file was asked for."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.started = time.monotonic()
        self.results = Results(environment=environment.before(plan.device, plan.settings.seed))

    def keep(self, rows: list[Measurement] | list[NetworkMeasurement]) -> None:
        """Takes in what one work or network gave."""
        for row in rows:
            if isinstance(row, Measurement):
                self.results.measurements.append(row)
                name = f"{row.provider} on {work_name(row)}"
            else:
                self.results.networks.append(row)
                name = f"{row.provider} in {row.network}"
            if row.status in ("failed", "wrong"):
                self.problem(f"{name}: {row.status}: {row.message}")
        if "json" in self.plan.outputs:
            save(self.results, _partial(self.plan.outputs["json"]))

    def problem(self, words: str) -> None:
        """Remembers what went wrong and says it at once, above the bar; once each."""
        if words not in self.results.problems:
            self.results.problems.append(words)
            tqdm.write(f"bench.py: {words}", file=sys.stderr)

    def finish(self, complete: bool) -> None:
        seconds = time.monotonic() - self.started
        around = environment.after(self.results.environment, self.plan.device, seconds)
        self.results.environment = around
        if around.gpu is not None:
            self.results.counts += cuda_counts(around.gpu.capability)
        self.results.complete = complete


def _measure_all(run: _Run) -> None:
    """Everything in the plan. The bar counts seconds as estimated, since works differ so."""
    plan = run.plan
    with tqdm(
        total=plan.seconds(),
        bar_format="{percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left{postfix}",
        smoothing=0,
        dynamic_ncols=True,
        disable=None,  # quiet unless standard error is a terminal
    ) as bar:
        for work in plan.works:
            bar.set_postfix_str(str(work))
            try:
                run.keep(measure(work, plan.providers_for(work), plan.device, plan.settings))
            except (RuntimeError, MemoryError) as error:  # its inputs do not fit into memory, say
                run.problem(f"{work}: not measured: {sentence(error)}")
            bar.update(plan.work_seconds(work))
        for network in plan.networks:
            bar.set_postfix_str(str(network))
            run.keep(measure_network(network, plan.network_providers, plan.device, plan.settings))
            bar.update(plan.network_seconds())
        if plan.callgrind:
            from speed.callgrind import CallgrindError, count

            bar.set_postfix_str("callgrind")
            try:
                run.results.counts += count()
            except CallgrindError as error:
                run.problem(f"callgrind: {error}")


def _write(results: Results, outputs: dict[str, Path]) -> None:
    """The files that were asked for, each whole or not at all, and the folder of plots.

    Raises:
        ResultsError: some cannot be written; the others have been.
    """
    failures = []
    for name, path in outputs.items():
        try:
            if name == "json":
                save(results, path)
                with suppress(OSError):
                    _partial(path).unlink(missing_ok=True)
            elif name == "csv":
                write_atomically(path, csv_text(results))
            elif name == "markdown":
                write_atomically(path, markdown(results))
            else:
                write_plots([results], path)
        except (ResultsError, OSError) as error:
            failures.append(str(error))
    if failures:
        raise ResultsError("; ".join(failures))


def bench(args: argparse.Namespace) -> int:
    """Measures what the options ask for; the exit status.

    Raises:
        UsageError: the options make no sense; nothing was measured.
        ResultsError: a file could not be written.
        KeyboardInterrupt: with the file that holds what was measured, if one was asked for.
    """
    plan = make_plan(args)
    with _threads(args.threads):
        run = _Run(plan)
        try:
            _measure_all(run)
        except KeyboardInterrupt:
            run.finish(complete=False)
            where = ""
            if "json" in plan.outputs:
                partial = _partial(plan.outputs["json"])
                save(run.results, partial)
                where = f"what was measured is in {partial}"
            print(text(run.results), end="")
            raise KeyboardInterrupt(where) from None
        run.finish(complete=True)
    try:  # first the files: nobody may be reading what is printed
        _write(run.results, plan.outputs)
    finally:
        print(text(run.results), end="")
    return 1 if run.results.problems else 0


def compare(args: argparse.Namespace) -> int:
    """Prints what changed from one result file to another; 1 where something became slower.

    Raises:
        ResultsError: a file cannot be read.
        UsageError: they have nothing in common.
    """
    before, after = load(args.before), load(args.after)
    if not changes(before, after):
        raise UsageError(f"{args.before} and {args.after} have no measurement in common")
    words, worse = report(before, after)
    print(words, end="")
    return 1 if worse else 0
