"""Results as text: tables for the terminal and for Markdown, the README's performance section, and
CSV in Liger's columns."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tabulate import tabulate

from speed.figures import in_order, look, ours
from speed.results import (
    Environment,
    Measurement,
    NetworkMeasurement,
    Operation,
    Results,
    ResultsError,
    load,
)

__all__ = [
    "BEGIN",
    "CSV_COLUMNS",
    "END",
    "csv_text",
    "environment_lines",
    "markdown",
    "readme_files",
    "readme_section",
    "text",
    "with_section",
    "work_name",
]

_OPERATIONS: tuple[Operation, ...] = ("forward", "backward", "full")
_MODES = {
    "noise": "training with noise",
    "quiet": "training without noise",
    "eval": "evaluation",
}
_METHODS = {"wall": "", "graph": "", "stream": ", launches included"}


def size(count: float | None) -> str:
    """Bytes as people read them: 1.6 MB."""
    if count is None:
        return ""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def milliseconds(median: float | None, p20: float | None, p80: float | None) -> str:
    """The median, with half the distance between the percentiles as the spread."""
    if median is None or p20 is None or p80 is None:
        return ""
    return f"{median:.4g} ±{50 * (p80 - p20) / median:.0f}%"


def work_name(row: Measurement) -> str:
    """The work in a few words, its operation left out."""
    words = [row.layer, "x".join(map(str, row.shape)), row.dtype]
    if row.groups:
        words.insert(2, f"{row.groups} groups")
    if row.memory_format != "contiguous":
        words.append(row.memory_format)
    return f"{' '.join(words)}, {_MODES[row.mode]}{_METHODS[row.method]}"


def _network_name(row: NetworkMeasurement) -> str:
    words = [row.network, f"({row.source})", f"batch {row.batch}", row.dtype]
    if row.memory_format != "contiguous":
        words.append(row.memory_format)
    return f"{' '.join(words)}, a training step"


def environment_lines(environment: Environment) -> list[str]:
    """What a reader has to know of the machine and the run."""
    e = environment
    device = [e.device_name]
    if e.gpu is not None:
        clock = "" if e.gpu.clock_mhz is None else f" at {e.gpu.clock_mhz:.0f} MHz"
        device += [f"{e.gpu.multiprocessors} multiprocessors{clock}"]
        if e.gpu.driver:
            device.append(f"driver {e.gpu.driver}")
    else:
        device += [f"{e.threads} thread{'s' * (e.threads != 1)} on {e.cores} cores"]
        if e.isa:
            device.append(f"CPU kernels for {e.isa}")
    packages = [f"{name} {number}" for name, number in e.packages.items()]
    versions = [f"torch {e.torch}", *packages, f"Python {e.python}"]
    commit = "" if e.commit is None else f" ({e.commit}{', changed' if e.uncommitted else ''})"
    loads = [f"{load:.1f}" for load in (e.load_before, e.load_after) if load is not None]
    when = [e.timestamp]
    if e.seconds is not None:
        when.append(f"{e.seconds:.0f} s")
    if loads:
        when.append(f"load average {' to '.join(loads)}")
    return [
        ", ".join(device),
        f"normnorm {e.normnorm}{commit}, {', '.join(versions)}",
        ", ".join(when),
        e.command_line,
    ]


def _groups(rows: Iterable[Measurement]) -> dict[tuple[object, ...], list[Measurement]]:
    """Rows of one work, all its operations, by suite and work in the order of the run."""
    found: dict[tuple[object, ...], list[Measurement]] = {}
    for row in rows:
        found.setdefault((row.suite, work_name(row)), []).append(row)
    return found


def _layer_table(results: Results, rows: Sequence[Measurement], style: str) -> str:
    """Providers down, operations across."""
    operations = [o for o in _OPERATIONS if any(row.operation == o for row in rows)]
    last = operations[-1]
    on_gpu = results.environment.gpu is not None
    head = [
        "provider", *(f"{o} ms" for o in operations), f"{last} / torch's", "GB/s", "of copy",
        *(["of issue"] if on_gpu else []), "kept", "peak", "error",
    ]  # fmt: skip
    body, remarks = [], []
    for provider in dict.fromkeys(row.provider for row in rows):
        mine = {row.operation: row for row in rows if row.provider == provider}
        times = [mine.get(o) for o in operations]
        judged = mine.get(last, next(iter(mine.values())))
        shares = [results.share_of_copy(judged)]
        if on_gpu:
            shares.append(results.share_of_issue(judged))
        if judged.status != "ok":
            remarks.append(f"{provider}: {judged.status}: {judged.message}")
        body.append([
            provider,
            *(milliseconds(t.median_ms, t.p20_ms, t.p80_ms) if t else "" for t in times),
            "" if judged.ratio is None else f"{judged.ratio:.2f}",
            "" if judged.gb_per_s is None else f"{judged.gb_per_s:.3g}",
            *("" if share is None else f"{100 * share:.0f}%" for share in shares),
            size(judged.kept_bytes),
            size(judged.peak_bytes),
            "" if judged.error is None else f"{judged.error:.0e}",
        ])  # fmt: skip
    return "\n".join([_tabulate(body, head, style), *_remarks(remarks, style)])


def _network_table(rows: Sequence[NetworkMeasurement], style: str) -> str:
    unit = f"{rows[0].unit}/s"
    head = ["provider", "norm", "layers", "ms a step", unit, "/ torch's", "peak"]
    body, remarks = [], []
    for row in rows:
        if row.status != "ok":
            remarks.append(f"{row.provider}: {row.status}: {row.message}")
        body.append([
            row.provider, row.norm, str(row.norm_layers),
            milliseconds(row.median_ms, row.p20_ms, row.p80_ms),
            "" if row.rate is None else f"{row.rate:.4g}",
            "" if row.ratio is None else f"{row.ratio:.3f}",
            size(row.peak_bytes),
        ])  # fmt: skip
    return "\n".join([_tabulate(body, head, style), *_remarks(remarks, style)])


def _tabulate(body: Sequence[Sequence[str]], head: Sequence[str], style: str) -> str:
    align = ("left", *("right" for _ in head[1:]))
    return tabulate(body, headers=head, tablefmt=style, colalign=align, disable_numparse=True)


def _remarks(remarks: Sequence[str], style: str) -> list[str]:
    lines = list(dict.fromkeys(remarks))
    return ["", *(f"* {line}" for line in lines)] if style == "github" and lines else lines


def _suite_ratios(results: Results) -> list[list[str]]:
    """Geometric means of the ratio to torch's layer: suite, dtype, format, mode by provider."""
    cells: dict[tuple[str, ...], dict[str, list[float]]] = {}
    for row in results.measurements:
        if row.ratio and row.operation == ("forward" if row.mode == "eval" else "full"):
            work = (row.suite, row.dtype, row.memory_format, row.mode)
            cells.setdefault(work, {}).setdefault(row.provider, []).append(row.ratio)
    providers = list(dict.fromkeys(p for cell in cells.values() for p in cell if p != "torch"))
    table = [["suite", "dtype", "format", "mode", "works", *providers]]
    for key, cell in cells.items():
        most = max(map(len, cell.values()))
        means = []
        for provider in providers:
            ratios = cell.get(provider, [])
            mean = math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None
            # A mean over fewer works than its neighbours' is not comparable with them.
            fewer = f" ({len(ratios)})" if len(ratios) < most else ""
            means.append("" if mean is None else f"{mean:.2f}{fewer}")
        table.append([*key, str(most), *means])
    return table


_LEGEND = (
    "ms: median of interleaved samples ± half the distance of the 20th and 80th percentiles. "
    "GB/s: bytes of one read and one write a pass over the time. of copy: of a copy of the input. "
    "of issue: of what the multiprocessors could issue. kept: for the backward pass. error: "
    "against the float64 reference, relative to the largest value."
)
_MEANS = (
    "Time over that of torch's layer, geometric means: forward and backward in training, forward "
    "in evaluation; below 1 is faster"
)


def _sections(results: Results, style: str) -> list[tuple[str, str]]:
    """(heading, table) for every work and network, and the means."""
    sections = [
        (work_name(rows[0]), _layer_table(results, rows, style))
        for rows in _groups(results.measurements).values()
    ]
    networks: dict[str, list[NetworkMeasurement]] = {}
    for row in results.networks:
        networks.setdefault(_network_name(row), []).append(row)
    sections += [(name, _network_table(rows, style)) for name, rows in networks.items()]
    if results.counts:
        body = [
            [c.work, c.mode, c.operation, c.isa, f"{c.instructions:.2f}"] for c in results.counts
        ]
        head = ["kernel", "mode", "operation", "ISA", "instructions an element"]
        sections.append(("Instructions, counted", _tabulate(body, head, style)))
    means = _suite_ratios(results)
    if len(means) > 1:
        sections.append((_MEANS, _tabulate(means[1:], means[0], style)))
    return sections


def text(results: Results) -> str:
    """Everything, for a terminal."""
    parts = [f"{name}\n\n{table}" for name, table in _sections(results, "simple")]
    return "\n\n".join([*parts, _LEGEND, "\n".join(environment_lines(results.environment))]) + "\n"


def markdown(results: Results) -> str:
    """Everything, as Markdown with a heading a work."""
    lines = environment_lines(results.environment)
    around = "\n".join(f"* {line}" for line in (*lines[:-1], f"`{lines[-1]}`"))
    parts = [f"### {name}\n\n{table}" for name, table in _sections(results, "github")]
    problems = "".join(f"* {problem}\n" for problem in results.problems)
    return "\n\n".join([around, *parts, _LEGEND, *([problems] if problems else [])]).strip() + "\n"


# The columns of linkedin/Liger-Kernel's benchmark/data/all_benchmark_data.csv.
CSV_COLUMNS = (
    "kernel_name", "kernel_provider", "kernel_operation_mode", "metric_name", "metric_unit",
    "x_name", "x_label", "x_value", "y_value_50", "y_value_20", "y_value_80",
    "extra_benchmark_config_str", "gpu_name", "timestamp", "liger_version",
)  # fmt: skip


def _csv_rows(results: Results) -> Iterable[list[object]]:
    around = results.environment
    # The last column's name is Liger's; its value says whose version it is.
    last = [around.device_name, around.timestamp, f"normnorm {around.normnorm}"]
    for row in results.measurements:
        if row.status != "ok":
            continue
        config = {
            "shape": row.shape, "dtype": row.dtype, "memory_format": row.memory_format,
            "mode": row.mode, "groups": row.groups, "method": row.method, "suite": row.suite,
        }  # fmt: skip
        if around.gpu is None:
            config["threads"] = around.threads
        extra = json.dumps(config)
        start = [row.layer, row.provider, row.operation]
        x = [row.x_name.replace(" ", "_"), row.x_name, f"{row.x_value:g}"]
        times = [row.median_ms, row.p20_ms, row.p80_ms]
        yield [*start, "speed", "ms", *x, *times, extra, *last]
        if row.peak_bytes is not None:
            peak = row.peak_bytes / 2**20
            yield [*start, "memory", "MB", *x, peak, peak, peak, extra, *last]


def csv_text(results: Results) -> str:
    """The layers' rows in the columns of Liger's benchmark data, whose tools then plot them.

    One row a time ("speed", ms) and one a peak ("memory", MB of 2**20 bytes, as Liger counts).
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows(_csv_rows(results))
    return out.getvalue()


# The README's performance section

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
_FROM = re.compile(r"<!-- rendered by `report.py` from (.+) -->")
_SECTION_MODES = {
    "noise": ("full", "forward + backward, training with noise"),
    "eval": ("forward", "forward, evaluation"),
}


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
        for words, rows in (
            (("network", "provider"), list(_network_ratios(results))),
            (("layer", "input", "operation", "provider"), list(_layer_ratios(results))),
        ):
            if rows:
                parts.append(_pipes(words, ("torch, ms", "ms", "ratio"), rows))
        failed = sum(row.status in ("failed", "wrong") for row in results.measurements)
        if failed:
            parts.append(f"{failed} measurements failed or were wrong; the file says which.")
    return "\n\n".join(parts)


def _network_ratios(results: Results) -> Iterator[tuple[str, ...]]:
    peers = {row.work: row for row in results.networks if row.provider == "torch"}
    for row in results.networks:
        peer = peers.get(row.work)
        if ours(row.provider) and peer is not None and row.ratio:
            yield _network_name(row), look(row.provider).label, *_pair(peer, row)


def _layer_ratios(results: Results) -> Iterator[tuple[str, ...]]:
    """The largest input of each layer, suite, dtype, memory format and mode, sweeps left out."""
    largest: dict[tuple[object, ...], list[Measurement]] = {}
    for mode, (operation, _) in _SECTION_MODES.items():
        works: dict[tuple[object, ...], list[Measurement]] = {}
        for row in results.select(mode=mode, operation=operation, status="ok"):
            if "sweep" not in row.suite:
                works.setdefault(row.work, []).append(row)
        for rows in works.values():
            first = rows[0]
            if not any(ours(row.provider) and row.ratio for row in rows):
                continue
            line = (first.layer, first.suite, first.dtype, first.memory_format, mode)
            if line not in largest or first.elements > largest[line][0].elements:
                largest[line] = rows
    for rows in largest.values():
        by_provider = {row.provider: row for row in rows}
        for provider in in_order(by_provider):
            row = by_provider[provider]
            if ours(provider) and row.peer in by_provider:
                words = ["x".join(map(str, row.shape)), row.dtype]
                words += [row.memory_format] if row.memory_format != "contiguous" else []
                what = _SECTION_MODES[row.mode][1]
                pair = _pair(by_provider[row.peer], row)
                yield row.layer, " ".join(words), what, look(provider).label, *pair


def _pair(
    peer: Measurement | NetworkMeasurement, row: Measurement | NetworkMeasurement
) -> tuple[str, str, str]:
    """Torch's median, ours, and their ratio."""
    digits = [f"{ms:#.3g}".removesuffix(".") for ms in (peer.median_ms or 0, row.median_ms or 0)]
    return digits[0], digits[1], f"{row.ratio:.2f}"


def _pipes(words: Sequence[str], numbers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with columns of words, then columns of numbers."""
    rule = [*("---" for _ in words), *("--:" for _ in numbers)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in ((*words, *numbers), rule, *rows))


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
