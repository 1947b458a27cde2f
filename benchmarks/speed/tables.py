"""Results as text: tables for the terminal and for Markdown, the comparison of two runs, the
README's performance section, and CSV in Liger's columns."""

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import NamedTuple

from speed.results import (
    MODES,
    PASSES,
    Environment,
    Measurement,
    NetworkMeasurement,
    Operation,
    Results,
    ResultsError,
    Row,
    grouped,
    load,
)


def table(
    head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1, markdown: bool = True
) -> str:
    """A Markdown table, or one aligned for a terminal; columns after the first ``words`` of them
    hold numbers and are aligned to the right."""
    lines = [list(head), *map(list, rows)]
    if markdown:
        lines.insert(1, ["---" if i < words else "--:" for i in range(len(head))])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < words else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _size(count: float | None) -> str:
    """Bytes for readers: 1.6 MB."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _milliseconds(row: Row | None) -> str:
    """The median, with half the distance between the percentiles as the spread."""
    if row is None or row.median_ms is None:
        return ""
    median, low, high = row.times
    return f"{median:.4g} ±{50 * (high - low) / median:.0f}%"


def environment_lines(environment: Environment) -> list[str]:
    """What a reader has to know of the machine and the run; the command line is the last."""
    e = environment
    device = [e.device_name]
    if e.gpu is not None:
        clock = "" if e.gpu.clock_mhz is None else f" at {e.gpu.clock_mhz:.0f} MHz"
        device += [f"{e.gpu.multiprocessors} multiprocessors{clock}"]
        device += [f"driver {e.gpu.driver}"] if e.gpu.driver else []
    else:
        device += [f"{e.threads} thread{'s' * (e.threads != 1)} on {e.cores} cores"]
        device += [f"CPU kernels for {e.isa}"] if e.isa else []
    packages = [f"{name} {number}" for name, number in e.packages.items()]
    commit = "" if e.commit is None else f" ({e.commit}{', changed' if e.uncommitted else ''})"
    versions = [f"normnorm {e.normnorm}{commit}", f"torch {e.torch}", *packages]
    loads = [f"{load:.1f}" for load in (e.load_before, e.load_after) if load is not None]
    when = [e.timestamp, *([] if e.seconds is None else [f"{e.seconds:.0f} s"])]
    when += [f"load average {' to '.join(loads)}"] if loads else []
    lines = [device, [*versions, f"Python {e.python}"], when, [e.command_line]]
    return [", ".join(line) for line in lines]


# All tables of a run


def _remarks(rows: Iterable[Row], markdown: bool) -> list[str]:
    """Why providers have no numbers, once each."""
    bad = [f"{row.provider}: {row.status}: {row.message}" for row in rows if row.status != "ok"]
    lines = list(dict.fromkeys(bad))
    return ["", *(f"* {line}" for line in lines)] if markdown and lines else lines


def _layer_table(results: Results, rows: Sequence[Measurement], markdown: bool) -> str:
    """Providers down, operations across."""
    operations: list[Operation] = [o for o in PASSES if any(row.operation == o for row in rows)]
    last = operations[-1]
    issue = results.environment.gpu is not None
    head = [
        "provider", *(f"{o} ms" for o in operations), f"{last} / torch's", "GB/s", "of copy",
        *(["of issue"] if issue else []), "kept", "peak", "error",
    ]  # fmt: skip
    body, judged = [], []
    for provider in dict.fromkeys(row.provider for row in rows):
        mine = {row.operation: row for row in rows if row.provider == provider}
        row = mine.get(last, next(iter(mine.values())))
        shares = [results.share_of_copy(row), *([results.share_of_issue(row)] if issue else [])]
        judged.append(row)
        body.append([
            provider, *(_milliseconds(mine.get(o)) for o in operations), _number(row.ratio, ".2f"),
            _number(row.gb_per_s, ".3g"), *(_number(share, ".0%") for share in shares),
            _size(row.kept_bytes), _size(row.peak_bytes), _number(row.error, ".0e"),
        ])  # fmt: skip
    return "\n".join([table(head, body, 1, markdown), *_remarks(judged, markdown)])


def _network_table(rows: Sequence[NetworkMeasurement], markdown: bool) -> str:
    unit = f"{rows[0].unit}/s"
    head = ["provider", "norm", "layers", "ms a step", unit, "/ torch's", "peak"]
    body = [
        [
            row.provider, row.norm, str(row.norm_layers), _milliseconds(row),
            _number(row.rate, ".4g"), _number(row.ratio, ".3f"), _size(row.peak_bytes),
        ]
        for row in rows
    ]  # fmt: skip
    return "\n".join([table(head, body, 2, markdown), *_remarks(rows, markdown)])


def _means(results: Results) -> list[list[str]]:
    """Geometric means of the ratio to torch's layer: suite, dtype, format, mode by provider."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in results.measurements:
        if row.ratio and row.operation == ("forward" if row.mode == "eval" else "full"):
            work = (row.suite, row.dtype, row.memory_format, row.mode)
            cells.setdefault(work, {}).setdefault(row.provider, []).append(row.ratio)
    providers = list(dict.fromkeys(p for cell in cells.values() for p in cell if p != "torch"))
    lines = [["suite", "dtype", "format", "mode", "works", *providers]]
    for key, cell in cells.items():
        most = max(map(len, cell.values()))
        means = []
        for provider in providers:
            ratios = cell.get(provider, [])
            mean = geometric_mean(ratios) if ratios else None
            # A mean over fewer works than its neighbours' is not comparable with them.
            fewer = f" ({len(ratios)})" if 0 < len(ratios) < most else ""
            means.append(_number(mean, ".2f") + fewer)
        lines.append([*key, str(most), *means])
    return lines


_LEGEND = (
    "ms: median of interleaved samples ± half the distance of the 20th and 80th percentiles. "
    "GB/s: bytes of one read and one write a pass over the time. of copy: of a copy of the input. "
    "of issue: of what the multiprocessors could issue. kept: for the backward pass. error: "
    "against the float64 reference, relative to the largest value."
)


def _sections(results: Results, markdown: bool) -> Iterator[tuple[str, str]]:
    """(heading, table) for every work and network, the counts and the means."""
    layers = grouped(results.measurements, lambda row: (row.suite, row.name))
    for (_, name), rows in layers.items():
        yield name, _layer_table(results, rows, markdown)
    for name, nets in grouped(results.networks, lambda row: row.name).items():
        yield name, _network_table(nets, markdown)
    if results.counts:
        body = [
            [c.work, c.mode, c.operation, c.isa, f"{c.instructions:.2f}"] for c in results.counts
        ]
        head = ["kernel", "mode", "operation", "ISA", "instructions an element"]
        yield "Instructions, counted", table(head, body, 4, markdown)
    head, *body = _means(results)
    if body:
        heading = (
            "Time over that of torch's layer, geometric means: forward and backward in training, "
            "forward in evaluation; below 1 is faster"
        )
        yield heading, table(head, body, 4, markdown)


def text(results: Results) -> str:
    """Everything, for a terminal."""
    parts = [f"{name}\n\n{lines}" for name, lines in _sections(results, markdown=False)]
    return "\n\n".join([*parts, _LEGEND, "\n".join(environment_lines(results.environment))]) + "\n"


def markdown(results: Results) -> str:
    """Everything, as Markdown with a heading for each work."""
    *lines, command = environment_lines(results.environment)
    around = "\n".join(f"* {line}" for line in (*lines, f"`{command}`"))
    parts = [f"### {name}\n\n{lines}" for name, lines in _sections(results, markdown=True)]
    problems = "\n".join(f"* {problem}" for problem in results.problems)
    return "\n\n".join([around, *parts, _LEGEND, problems]).strip() + "\n"


# CSV

# The columns of linkedin/Liger-Kernel's benchmark/data/all_benchmark_data.csv.
CSV_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip


def csv_text(results: Results) -> str:
    """The layers' rows in the columns of Liger's benchmark data, whose tools then plot them.

    One row a time ("speed", ms) and one a peak ("memory", MB of 2**20 bytes, as Liger counts).
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    around = results.environment
    # The last column's name is Liger's; its value names the project beside the version.
    last = [around.device_name, around.timestamp, f"normnorm {around.normnorm}"]
    for row in results.select(status="ok"):
        names = ("shape", "dtype", "memory_format", "mode", "groups", "method", "suite")
        config = {name: getattr(row, name) for name in names}
        if around.gpu is None:
            config["threads"] = around.threads
        start = [row.layer, row.provider, row.operation]
        x = [row.x_name.replace(" ", "_"), row.x_name, f"{row.x_value:g}"]
        end = [json.dumps(config), *last]
        writer.writerow([*start, "speed", "ms", *x, *row.times, *end])
        if row.peak_bytes is not None:
            writer.writerow([*start, "memory", "MB", *x, *[row.peak_bytes / 2**20] * 3, *end])
    return out.getvalue()


# Comparison of two runs

SMALLEST = 0.05  # a smaller relative change is not called one, however quiet the machine was


class Change(NamedTuple):
    """One measurement in two runs."""

    name: str  # work, operation and provider
    before_ms: float  # medians
    after_ms: float
    ratio: float  # after over before
    # Half the distance of the 20th and 80th percentiles over the median; the larger of the runs'.
    noise: float
    # How the ratio to torch's layer changed, after over before, which leaves out what made the
    # whole machine slower; None where it was not known.
    against_torch: float | None
    # Whether the time moved by more than 5 % and by more than the noise, and the ranges between the
    # 20th and 80th percentiles of the two runs do not touch.
    significant: bool


def _full_name(row: Measurement | NetworkMeasurement) -> str:
    operation = f", {row.operation}" if isinstance(row, Measurement) else ""
    return f"{row.name}{operation}, {row.provider}"


def _timed(results: Results) -> dict[tuple[object, ...], Measurement | NetworkMeasurement]:
    """Rows with a time, by what they measure."""
    return {(*row.work, row.provider): row for row in results.rows if row.median_ms is not None}


def changes(before: Results, after: Results) -> list[Change]:
    """Everything that both runs timed, the largest slowdown first."""
    found, now = [], _timed(after)
    for key, old in _timed(before).items():
        if key not in now:
            continue
        new = now[key]
        (a, a20, a80), (b, b20, b80) = old.times, new.times
        noise = max((a80 - a20) / (2 * a), (b80 - b20) / (2 * b))
        moved = abs(math.log(b / a)) > math.log1p(max(SMALLEST, noise))
        against = new.ratio / old.ratio if new.ratio and old.ratio else None
        significant = moved and (b20 > a80 or a20 > b80)
        found.append(Change(_full_name(new), a, b, b / a, noise, against, significant))
    return sorted(found, key=lambda change: -change.ratio)


_COMPARED = ("cpu", "cores", "threads", "isa", "device", "platform", "torch", "cuda", "cudnn")


def differences(before: Environment, after: Environment) -> list[str]:
    """Where the two runs' machines or versions differ: then the change is not the code's alone."""
    both = [
        {name: getattr(e, name) for name in _COMPARED}
        | {"gpu": e.gpu.name if e.gpu else None}
        | e.packages
        for e in (before, after)
    ]
    pairs = {name: (both[0].get(name), both[1].get(name)) for name in both[0] | both[1]}
    return [f"{name}: {a} before, {b} after" for name, (a, b) in pairs.items() if a != b]


def _change_table(found: Iterable[Change]) -> str:
    head = ["work", "before ms", "after ms", "change", "noise", "against torch's"]
    body = [
        [
            c.name, f"{c.before_ms:.4g}", f"{c.after_ms:.4g}", f"{c.ratio - 1:+.0%}",
            f"±{c.noise:.0%}", "" if c.against_torch is None else f"{c.against_torch - 1:+.0%}",
        ]
        for c in found
    ]  # fmt: skip
    return table(head, body, markdown=False)


def comparison(before: Results, after: Results) -> tuple[str, bool]:
    """The comparison in words, and whether something became slower or stopped working."""
    found, old = changes(before, after), _timed(before)
    failures = [
        f"{_full_name(row)}: {row.status}: {row.message}"
        for row in after.rows
        if (*row.work, row.provider) in old and row.status in ("failed", "wrong")
    ]
    worse = [change for change in found if change.significant and change.ratio > 1]
    better = [change for change in reversed(found) if change.significant and change.ratio < 1]
    other = [f"  {line}" for line in differences(before.environment, after.environment)]
    parts = ["\n".join(["The runs differ in more than the code:", *other])] if other else []
    parts += [f"slower\n\n{_change_table(worse)}"] if worse else []
    parts += [f"faster\n\n{_change_table(better)}"] if better else []
    parts += ["\n".join(["no longer measured", *failures])] if failures else []
    same = len(found) - len(worse) - len(better)
    only = len(old) - len(found), len(_timed(after)) - len(found)
    parts.append(
        f"{len(found)} times compared: {len(worse)} slower, {len(better)} faster, {same} within "
        f"{SMALLEST:.0%} or the noise; {only[0]} only before, {only[1]} only after"
    )
    return "\n\n".join(parts) + "\n", bool(worse or failures)


# The README's performance section

_OURS = {
    "normnorm-cpu": "normnorm (CPU)", "normnorm-cuda": "normnorm (CUDA)",
    "normnorm-triton": "normnorm (Triton)", "normnorm-reference": "normnorm (reference)",
}  # fmt: skip
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
_FROM = re.compile(r"<!-- rendered by `report.py` from (.+) -->")


def readme_section(paths: Sequence[Path], folder: Path) -> str:
    """For each result file: its environment, the whole networks' training steps, and each layer's
    largest input beside torch's layer. Links lead from ``folder``.

    Raises:
        ResultsError: a file cannot be read.
    """
    links = [Path(os.path.relpath(p.resolve(), folder.resolve())).as_posix() for p in paths]
    parts = [f"<!-- rendered by `report.py` from {' '.join(links)} -->"]
    for path, link in zip(paths, links, strict=True):
        results = load(path)
        lines = environment_lines(results.environment)[:-1]
        parts.append("; ".join(lines) + f". All rows: [{path.name}]({link}).")
        if not results.complete:
            parts.append("The run was interrupted; the file has the rows up to then.")
        numbers = ("torch, ms", "ms", "ratio")
        networks = grouped(results.networks, lambda row: row.name).items()
        steps = [(name, *cells) for name, rows in networks for cells in _against_torch(rows)]
        for head, rows in (
            (("network", "provider"), steps),
            (("layer", "input", "operation", "provider"), list(_layer_ratios(results))),
        ):
            if rows:
                parts.append(table((*head, *numbers), rows, len(head)))
        failed = sum(row.status in ("failed", "wrong") for row in results.measurements)
        if failed:
            parts.append(f"{failed} measurements failed or were wrong; the file says which.")
    return "\n\n".join(parts)


def _against_torch(rows: Iterable[Row]) -> list[tuple[str, ...]]:
    """For each backend's row of one work its name, torch's median, its own, and their ratio."""
    by_provider, found = {row.provider: row for row in rows}, []
    for provider, row in by_provider.items():
        peer = by_provider.get(row.peer or "")
        if provider in _OURS and row.ratio and peer is not None:
            medians = (f"{ms:#.3g}".removesuffix(".") for ms in (peer.times[0], row.times[0]))
            found.append((_OURS[provider], *medians, f"{row.ratio:.2f}"))
    return found


def _layer_ratios(results: Results) -> Iterator[tuple[str, ...]]:
    """Training with noise of each layer, dtype and memory format: its largest input, no sweep."""
    wanted = results.select(mode="noise", operation="full", status="ok")
    outside = (row for row in wanted if "sweep" not in row.suite)
    works = grouped(outside, lambda row: row.work).values()
    compared = [rows for rows in works if _against_torch(rows)]
    for same in grouped(
        compared, lambda rows: (rows[0].layer, rows[0].dtype, rows[0].memory_format)
    ).values():
        largest = max(same, key=lambda rows: rows[0].elements)
        for ratio in _against_torch(largest):
            what = f"{PASSES['full']}, {MODES['noise']}"
            yield largest[0].layer, largest[0].input, what, *ratio


def with_section(text: str, section: str, name: str = "README.md") -> str:
    """A text with the section between its markers.

    Raises:
        ResultsError: the text does not have the two markers once each, in order.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ResultsError(f'{name} must have "{BEGIN}" and, after it, "{END}", once each')
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{section}\n{END}{after}"


def readme_files(text: str, folder: Path) -> list[Path]:
    """The result files that the section of a text was rendered from.

    Raises:
        ResultsError: the text does not say.
    """
    match = _FROM.search(text)
    if match is None:
        raise ResultsError("no performance section says what it was rendered from")
    return [folder / name for name in match[1].split()]
