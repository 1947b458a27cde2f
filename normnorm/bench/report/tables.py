"""The report's tables as rows of text, for a page, for Markdown, and for readers of either."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from normnorm.bench.distributed_model import PARAMETERS
from normnorm.bench.gloo import CollectiveCheck
from normnorm.bench.report.growth import exponent
from normnorm.bench.report.style import in_order, look, ours
from normnorm.bench.results import (
    Count,
    Environment,
    Measurement,
    NetworkMeasurement,
    Results,
)
from normnorm.bench.scaling import Sweep

__all__ = [
    "Table",
    "across",
    "collectives_table",
    "counts_table",
    "environment_lines",
    "measurement_table",
    "network_table",
    "number",
    "parameter_table",
    "ratio",
    "summary",
    "sweep_table",
]

_TORCH = ("torch", "cudnn")


class Table(NamedTuple):
    """Cells of text.

    Attributes:
        head: a name for each column.
        rows: cells, as many as names.
        words: how many columns, from the left, are words; the others are numbers.
    """

    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    words: int


def number(value: float | None, digits: int = 3) -> str:
    """With so many digits, trailing zeros included, and no exponent where one can be avoided."""
    if value is None:
        return ""
    if value and not 1e-4 <= abs(value) < 1e7:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:.0f}"
    return f"{value:#.{digits}g}".removesuffix(".")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f}"


def _megabytes(value: int | None) -> str:
    return "" if value is None else number(value / 1e6)


def measurement_table(results: Results, machine: str) -> Table:
    """Every row of a run, those that failed included."""
    rows = []
    for m in results.measurements:
        of_copy, of_issue = results.share_of_copy(m), results.share_of_issue(m)
        rows.append((
            machine, m.layer, _shape(m),
            m.dtype, m.memory_format, m.mode, m.operation, look(m.provider).label, m.suite,
            m.method,
            number(m.median_ms, 4), number(m.p20_ms, 4), number(m.p80_ms, 4), number(m.ratio),
            number(m.gb_per_s), _percent(of_copy), _percent(of_issue),
            _megabytes(m.kept_bytes), _megabytes(m.peak_bytes), number(m.error, 2),
            m.status if m.status == "ok" else f"{m.status}: {m.message}",
        ))  # fmt: skip
    head = (
        "machine", "layer", "shape", "dtype", "memory format", "mode", "operation", "provider",
        "suite", "method", "ms", "20 %", "80 %", "ratio", "GB/s", "% of copy", "% of issue",
        "kept MB", "peak MB", "error", "status",
    )  # fmt: skip
    return Table(head, rows, 10)


def network_table(networks: Iterable[NetworkMeasurement]) -> Table:
    """Every training step of a run."""
    rows = [
        (
            f"{n.network} ({n.source})", n.norm, look(n.provider).label, n.dtype, n.memory_format,
            str(n.batch), number(n.median_ms, 4),
            f"{number(n.rate, 4)} {n.unit}" if n.rate else "", number(n.ratio),
            _megabytes(n.peak_bytes),
            n.status if n.status == "ok" else f"{n.status}: {n.message}",
        )
        for n in networks
    ]  # fmt: skip
    head = (
        "network", "normalization", "provider", "dtype", "memory format", "batch", "ms a step",
        "a second", "ratio", "peak MB", "status",
    )  # fmt: skip
    return Table(head, rows, 5)


def counts_table(counts: Iterable[Count]) -> Table:
    """Instructions an element, a line a work, isa and dtype; a column an operation and mode."""
    works: dict[tuple[str, ...], dict[tuple[str, str], float]] = {}
    for count in counts:
        work = works.setdefault((count.work, count.isa, count.dtype), {})
        work[count.operation, count.mode] = count.instructions
    passes = list(dict.fromkeys(key for found in works.values() for key in found))
    rows = [(*key, *(number(found.get(p)) for p in passes)) for key, found in works.items()]
    names = tuple(f"{operation}, {_MODE_NAMES[mode]}" for operation, mode in passes)
    return Table(("work", "instruction set", "dtype", *names), rows, 3)


_MODE_NAMES = {"noise": "noise", "quiet": "no noise", "eval": "evaluation"}
_SUMMARY_MODES = (("noise", "full"), ("quiet", "full"), ("eval", "forward"))
_MODE_WORDS = {
    "noise": "forward + backward, noise",
    "quiet": "forward + backward, no noise",
    "eval": "forward, evaluation",
}


def summary(results: Results, modes: Sequence[str] = ("noise", "eval")) -> Table:
    """A line for each layer, suite, dtype, memory format and mode: times at the largest input,
    and ratios to torch's layer as geometric means over all inputs.

    Sweeps are left out, as are works that none of our backends did or torch's layer did not.
    """
    compared = _lines(results, modes)
    providers = in_order(
        row.provider for works in compared.values() for rows in works for row in rows
    )
    mine = [provider for provider in providers if ours(provider)]
    others = [p for p in providers if not ours(p) and p not in (*_TORCH, "copy")]
    head = ["layer", "inputs", "what", "largest", "torch, ms"]
    for provider in mine:
        head += [f"{look(provider).label}, ms", "/ torch", "over inputs"]
    head += [f"{look(provider).label} / torch" for provider in others]
    cells = []
    for name, works in compared.items():
        largest = {row.provider: row for row in max(works, key=lambda rows: rows[0].elements)}
        any_row = next(iter(largest.values()))
        peer = next(row.peer for row in largest.values() if row.peer)
        line_ = [*name, _shape(any_row), number(largest[peer].median_ms)]
        for provider in mine:
            found = largest.get(provider)
            mean, spread = _mean_ratio(works, provider)
            line_ += [number(found.median_ms) if found else "", mean, spread]
        line_ += [_mean_ratio(works, provider)[0] for provider in others]
        cells.append(tuple(line_))
    return Table(tuple(head), cells, 4)


def _lines(
    results: Results, modes: Sequence[str]
) -> dict[tuple[str, str, str], list[list[Measurement]]]:
    """The works of each of the summary's lines, each with the rows of all providers."""
    lines: dict[tuple[str, str, str], dict[tuple[object, ...], list[Measurement]]] = {}
    for mode, operation in _SUMMARY_MODES:
        for row in results.select(mode=mode, operation=operation, status="ok"):
            if mode in modes and "sweep" not in row.suite:
                line = lines.setdefault(_line(row), {})
                line.setdefault(row.work, []).append(row)
    compared = {name: _compared(works) for name, works in lines.items()}
    return {name: works for name, works in compared.items() if works}


def across(runs: Sequence[tuple[str, Results]], modes: Sequence[str] = ("noise", "eval")) -> Table:
    """Mean ratios to torch's layer of our backends, a column for each of them on each machine;
    a line for what at least two machines did."""
    lines: dict[tuple[str, str, str], dict[tuple[str, str], str]] = {}
    for machine, results in runs:
        for name, works in _lines(results, modes).items():
            for provider in in_order(row.provider for rows in works for row in rows):
                if ours(provider):
                    mean, _ = _mean_ratio(works, provider)
                    lines.setdefault(name, {})[machine, provider] = mean
    columns = list(dict.fromkeys(column for found in lines.values() for column in found))
    rows = [
        (*name, *(found.get(column, "") for column in columns))
        for name, found in lines.items()
        if len({machine for machine, _ in found}) > 1
    ]
    heads = (f"{machine}: {look(provider).label}" for machine, provider in columns)
    return Table(("layer", "inputs", "what", *heads), rows, 3)


def _line(row: Measurement) -> tuple[str, str, str]:
    """What a line of the summary is about."""
    words = [row.suite]
    if row.memory_format != "contiguous":
        words.append(row.memory_format)
    words.append(row.dtype)
    if row.method == "stream":
        words.append("with launches")
    return row.layer, ", ".join(words), _MODE_WORDS[row.mode]


def _shape(row: Measurement) -> str:
    return "x".join(map(str, row.shape)) + (f" / {row.groups}" if row.groups else "")


def _compared(works: dict[tuple[object, ...], list[Measurement]]) -> list[list[Measurement]]:
    """The works that one of our backends and torch's layer did."""
    return [
        rows
        for rows in works.values()
        if any(ours(row.provider) for row in rows)
        and any(row.peer in {other.provider for other in rows} for row in rows)
    ]


def _mean_ratio(works: Sequence[Sequence[Measurement]], provider: str) -> tuple[str, str]:
    """The geometric mean of a provider's ratios, and their number and range."""
    ratios = [row.ratio for rows in works for row in rows if row.provider == provider and row.ratio]
    if not ratios:
        return "", ""
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    spread = f"{ratio(min(ratios))} to {ratio(max(ratios))}" if len(ratios) > 1 else ""
    return ratio(mean), f"{len(ratios)}: {spread}" if spread else "1"


def ratio(value: float | None) -> str:
    """Two decimals, or none where they would not mean anything."""
    if value is None:
        return ""
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}"


def environment_lines(around: Environment) -> Iterator[tuple[str, str]]:
    """Everything known of where a run took place, in readers' order."""
    gpu = around.gpu
    yield "device", around.device_name
    if gpu is not None:
        yield "GPU memory", f"{gpu.memory_bytes / 2**30:.0f} GiB, L2 {gpu.l2_bytes / 2**20:.0f} MiB"
        major, minor = gpu.capability
        yield "multiprocessors", f"{gpu.multiprocessors}, capability {major}.{minor}"
        clocks = {
            "after the run": gpu.clock_mhz,
            "highest": gpu.max_clock_mhz,
            "memory": gpu.memory_clock_mhz,
        }
        known = [f"{name} {value:.0f} MHz" for name, value in clocks.items() if value]
        if known:
            yield "clocks", ", ".join(known)
        if gpu.power_limit_w:
            yield "power limit", f"{gpu.power_limit_w:.0f} W"
        if gpu.driver:
            yield "driver", gpu.driver
        yield "processor", around.cpu
    yield "cores, threads", f"{around.cores}, {around.threads}"
    if around.isa:
        yield "instruction set", around.isa
    loads = [f"{load:.2f}" for load in (around.load_before, around.load_after) if load is not None]
    if loads:
        yield "load average", " before, ".join(loads) + (" after" if len(loads) == 2 else " before")
    yield "platform", around.platform
    yield "versions", ", ".join(_versions(around))
    commit = around.commit or "unknown"
    yield "commit", commit + (" with uncommitted changes" if around.uncommitted else "")
    yield "begun", around.timestamp
    if around.seconds:
        yield "took", f"{around.seconds:.0f} s"
    yield "command", around.command_line


def _versions(around: Environment) -> Iterator[str]:
    yield f"normnorm {around.normnorm}"
    yield f"torch {around.torch}"
    yield f"Python {around.python}"
    if around.cuda:
        yield f"CUDA {around.cuda}"
    if around.cudnn:
        yield f"cuDNN {around.cudnn}"
    for name, version in around.packages.items():
        yield f"{name} {version}"


def sweep_table(sweeps: Iterable[Sweep]) -> Table:
    """Fitted exponents."""
    rows = [
        (
            s.layer, look(s.provider).label, s.against, s.kept,
            f"{s.points[0].x:.0f} to {s.points[-1].x:.0f}", exponent(s.fit),
            number(1e3 * s.fit.offset_ms) if s.against in ("elements", "groups") else "",
            f"{100 * s.fit.residual:.0f}",
        )
        for s in sweeps
    ]  # fmt: skip
    head = (
        "layer", "provider", "against", "kept", "range", "exponent", "offset, us", "residual, %",
    )  # fmt: skip
    return Table(head, rows, 5)


def collectives_table(checks: Iterable[CollectiveCheck]) -> Table:
    """Messages predicted and measured."""
    rows = [
        (
            c.what, str(c.processes), str(c.calls), number(c.bytes / 1e6), number(c.alpha_us),
            number(c.gb_per_s), number(c.predicted_ms), number(c.measured_ms), number(c.wall_ms),
            f"{100 * c.error:+.0f}",
        )
        for c in checks
    ]  # fmt: skip
    head = (
        "sequence", "processes", "messages", "MB", "alpha, us", "1/beta, GB/s", "predicted, ms",
        "measured, ms", "by the clock, ms", "error, %",
    )  # fmt: skip
    return Table(head, rows, 1)


def parameter_table() -> Table:
    """What the model of several GPUs stands on."""
    rows = [(p.meaning, p.source, f"{p.value:g} {p.unit}".strip()) for p in PARAMETERS.values()]
    return Table(("parameter", "source", "value"), rows, 2)
