"""What the scripts do: measure under a progress bar, compare two runs, render stored results."""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from normnorm.cli import CommandError
from speed import tables
from speed.counts import count_cpu
from speed.measure import Run
from speed.options import Plan, make_plan
from speed.results import Results, ResultsError, load, save, write_atomically


def _measure_all(plan: Plan, run: Run) -> None:
    """Everything in the plan. The bar counts what has the same budget of time: an operation of a
    layer, of all providers together; a network has twice that."""
    with tqdm(
        total=sum(len(work.operations) for work in plan.works) + 2 * len(plan.networks),
        bar_format="{percentage:3.0f} %|{bar}| {elapsed} passed, {remaining} left{postfix}",
        smoothing=0,
        dynamic_ncols=True,
        disable=None,  # quiet unless standard error is a terminal
    ) as bar:
        for work in plan.works:
            bar.set_postfix_str(str(work))
            run.layer(work, plan.providers_for(work))
            bar.update(len(work.operations))
        for network in plan.networks:
            bar.set_postfix_str(str(network))
            run.network(network, plan.network_providers)
            bar.update(2)
        if plan.callgrind:
            bar.set_postfix_str("callgrind")
            try:
                run.results.counts += count_cpu()
            except CommandError as error:
                run.problem(f"callgrind: {error}")


def bench(args: argparse.Namespace) -> int:
    """Measures what the options ask for; the exit status: 1 where a provider failed or gave wrong
    numbers. A sentence on stderr says which.

    Raises:
        CommandError: the options make no sense; nothing was measured.
        ResultsError: a file could not be written.
        KeyboardInterrupt: with the file that holds what was measured, if one was asked for.
    """
    plan = make_plan(args)
    if "png" in plan.outputs:
        import speed.plots  # noqa: F401  (a missing package shall end the run here)
    json = plan.outputs.get("json")
    # What stands at the JSON's path stays until the run is over.
    partial = json and json.with_name(json.name + ".partial")
    if args.threads:
        torch.set_num_threads(args.threads)
    run = Run(
        plan.device, plan.settings, partial,
        lambda words: tqdm.write(f"bench.py: {words}", file=sys.stderr),
    )  # fmt: skip
    try:
        _measure_all(plan, run)
    except KeyboardInterrupt:
        run.finish(complete=False)
        print(tables.text(run.results), end="")
        where = f"what was measured is in {partial}" if partial else ""
        raise KeyboardInterrupt(where) from None
    run.finish(complete=True)
    try:  # files first: printing to a closed pipe raises
        _write([run.results], plan.outputs)
        if partial:
            with suppress(OSError):
                partial.unlink()
    finally:
        print(tables.text(run.results), end="")
    return 1 if run.results.problems else 0


def _write(runs: Sequence[Results], outputs: dict[str, Path]) -> list[Path]:
    """The files that were asked for, each whole or not at all, and the folder of plots.

    Raises:
        ResultsError: some cannot be written; the others have been.
    """
    written, failures = [], []
    for name, path in outputs.items():
        try:
            if name == "json":
                save(runs[0], path)
            elif name == "csv":
                write_atomically(path, tables.csv_text(runs[0]))
            elif name == "markdown":
                write_atomically(path, "\n".join(map(tables.markdown, runs)))
            else:
                from speed.plots import write_plots

                written += write_plots(runs, path)
                continue
            written.append(path)
        except ResultsError as error:
            failures.append(str(error))
    if failures:
        raise ResultsError("; ".join(failures))
    return written


def compare(args: argparse.Namespace) -> int:
    """Prints what changed from one result file to another; 1 where something became slower.

    Raises:
        ResultsError: a file cannot be read.
        CommandError: they have nothing in common.
    """
    before, after = load(args.before), load(args.after)
    if not tables.changes(before, after):
        raise CommandError(f"{args.before} and {args.after} have no measurement in common")
    words, worse = tables.comparison(before, after)
    print(words, end="")
    return 1 if worse else 0


def report(args: argparse.Namespace) -> int:
    """Renders stored results; everything is read before anything is written.

    Raises:
        ResultsError: something cannot be read or written.
    """
    outputs = {name: getattr(args, name) for name in ("markdown", "png")}
    outputs = {name: path for name, path in outputs.items() if path is not None}
    if not outputs and args.readme is None:
        raise ResultsError("nothing to write: give --png, --markdown or --readme")
    runs, written = [load(path) for path in args.results], []
    if args.readme is not None:
        try:
            before = args.readme.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ResultsError(f"cannot read {args.readme}: {reason}") from None
        section = tables.readme_section(args.results, args.readme.parent)
        write_atomically(args.readme, tables.with_section(before, section, str(args.readme)))
        written.append(args.readme)
    for path in [*written, *_write(runs, outputs)]:
        print(f"wrote {path}")
    return 0
