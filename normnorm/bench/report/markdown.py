"""The README's performance section, rendered from stored results between two markers."""

from __future__ import annotations

import os
import re
from pathlib import Path

from normnorm.bench.report import tables
from normnorm.bench.report.growth import ALLOWED_ERROR, exponent, model_is_supported
from normnorm.bench.report.sources import Source, Sources, read
from normnorm.bench.report.style import look, ours
from normnorm.bench.report.tables import Table
from normnorm.bench.results import Environment, ResultsError
from normnorm.bench.scaling import Scaling

__all__ = ["BEGIN", "END", "render_markdown", "sources_of", "with_section"]

BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
_FROM = re.compile(r"<!-- rendered by `normnorm report` from (.+) -->")


def render_markdown(sources: Sources, folder: Path) -> str:
    """What is measured and what is modelled, with provenance; links lead from ``folder``."""
    parts = [f"<!-- rendered by `normnorm report` from {' '.join(_paths(sources, folder))} -->"]
    for run, name in zip(sources.runs, sources.names(), strict=True):
        parts += _run(run, name, folder)
    for path, study in sources.studies:
        parts += _study(path, study, folder)
    return "\n\n".join(parts)


def _paths(sources: Sources, folder: Path) -> list[str]:
    paths = [*(run.path for run in sources.runs), *(path for path, _ in sources.studies)]
    return [_relative(path, folder) for path in paths if path is not None]


def _relative(path: Path, folder: Path) -> str:
    return Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()


def _pipes(table: Table) -> str:
    def line(cells: tuple[str, ...]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    rule = tuple("---" if i < table.words else "--:" for i in range(len(table.head)))
    return "\n".join(map(line, (table.head, rule, *table.rows)))


def _provenance(around: Environment) -> str:
    """The machine, versions and commit in a sentence."""
    words = [f"{around.cores} processors, {around.threads} of them used"]
    if around.gpu is not None:
        words = [f"driver {around.gpu.driver}"] if around.gpu.driver else []
    elif around.isa:
        words.append(around.isa.upper())
    words += [f"torch {around.torch}", f"normnorm {around.normnorm}"]
    if around.commit:
        dirty = " with uncommitted changes" if around.uncommitted else ""
        words.append(f"commit {around.commit[:9]}{dirty}")
    words.append(around.timestamp[:10])
    if around.load_before is not None:
        words.append(f"load average {around.load_before:.1f} before the run")
    return ", ".join(words)


def _run(run: Source, name: str, folder: Path) -> list[str]:
    parts = [f"**Measured: {name}.** {_capital(_provenance(run.environment))}."]
    if run.path is not None:
        parts[-1] += f" Everything in [{run.path.name}]({_relative(run.path, folder)})."
    if not run.results.complete:
        parts[-1] += " The run was interrupted: this is what it had."
    table = tables.summary(run.results)
    if table.rows:
        parts.append(_pipes(table))
        parts.append(
            "Medians of calls in alternation; times at the largest input, ratios as geometric "
            "means over all of them, with their number and range. Noise: training as published. "
            "Below 1 is faster than torch's own layer."
        )
    networks = [row for row in run.results.networks if row.status == "ok"]
    if networks:
        parts.append("Training steps of whole networks, of which only the norm layers differ:")
        parts.append(_pipes(_networks(run)))
    if run.results.counts and run.environment.gpu is None:
        parts.append("Instructions an element of the CPU kernels, counted, which repeats exactly:")
        parts.append(_pipes(tables.counts_table(run.results.counts)))
    failed = sum(m.status in ("failed", "wrong") for m in run.results.measurements)
    if failed:
        parts.append(f"{failed} measurements failed or were wrong; the file says which.")
    return parts


def _networks(run: Source) -> Table:
    rows = [
        (
            f"{n.network}, batch {n.batch}, {n.dtype}", n.norm, look(n.provider).label,
            tables.number(n.median_ms, 4), f"{tables.number(n.rate, 4)} {n.unit}",
            tables.ratio(n.ratio),
        )
        for n in run.results.networks
        if n.status == "ok"
    ]  # fmt: skip
    return Table(("network", "layer", "by", "ms a step", "a second", "/ torch"), rows, 3)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _study(path: Path, study: Scaling, folder: Path) -> list[str]:
    around = study.environment
    link = f"[{path.name}]({_relative(path, folder)})"
    parts = []
    mine = [s for s in study.sweeps if ours(s.provider)]
    if mine:
        parts.append(
            f"**Measured: how cost grows** on {around.device_name} ({_provenance(around)}; "
            f"{link}): forward and backward of one layer take offset + c x^k, k with its 95 % "
            "confidence interval."
        )
        rows = [(s.layer, s.against, s.kept, exponent(s.fit)) for s in mine]
        parts.append(_pipes(Table(("layer", "against", "while", "k"), rows, 3)))
    if study.collectives:
        worst = max(abs(check.error) for check in study.collectives)
        processes = sorted({check.processes for check in study.collectives})
        counts = " and ".join(map(str, processes))
        parts.append(
            "**Measured: messages.** What alpha + b beta predicts of a training step's messages "
            f"between {counts} gloo processes is within {100 * worst:.0f} % of the measurement "
            f"({link})."
        )
    if model_is_supported(study.collectives):
        parts.append(_model(folder))
    elif study.collectives:
        parts.append(
            f"That is more than the {100 * ALLOWED_ERROR:.0f} % at which a model of several GPUs "
            "would be shown."
        )
    return parts


def _model(folder: Path) -> str:
    from normnorm.bench.distributed_model import GPUS, step_time

    most = GPUS[-1]
    alone = step_time(most, synchronised=False).total
    together = step_time(most, synchronised=True).total
    low, high = (100 * (t / a - 1) for t, a in zip(together, alone, strict=True))
    return (
        f"**Modelled, not measured:** on {most} A100s in one node a ResNet-50 training step with "
        f"synchronised statistics takes {low:.0f} to {high:.0f} % longer than with each GPU's own; "
        f"{_parameters(folder)} has the parameters with their sources."
    )


def _parameters(folder: Path) -> str:
    """A link where it leads somewhere."""
    page = "docs/scaling.md"
    return f"[{page}]({page}#several-gpus)" if (folder / page).exists() else page


# The README


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


def sources_of(text: str, folder: Path) -> Sources:
    """What the section of a text says it was rendered from.

    Raises:
        ResultsError: it does not say, or a file it names cannot be read.
    """
    match = _FROM.search(text)
    if match is None:
        raise ResultsError("no performance section says what it was rendered from")
    return read(folder / name for name in match[1].split())
