"""What became slower between two result files, with the noise beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tabulate import tabulate

from speed.results import Environment, Measurement, NetworkMeasurement, Results
from speed.tables import work_name

__all__ = ["Change", "changes", "differences", "report", "slower"]

# A change smaller than this is not called one, however quiet the machine was.
SMALLEST = 0.05


@dataclass(frozen=True)
class Change:
    """One measurement in two runs.

    Attributes:
        name: work, operation and provider.
        before_ms, after_ms: medians.
        ratio: after over before.
        noise: half the distance of the 20th and 80th percentiles over the median, the larger of
            the two runs.
        against_torch: how the ratio to torch's layer changed, after over before, which leaves out
            what made the whole machine slower; None where it was not known.
        significant: whether the time moved by more than 5 % and by more than the noise, and the
            ranges between the 20th and 80th percentiles of the two runs do not touch.
    """

    name: str
    before_ms: float
    after_ms: float
    noise: float
    against_torch: float | None
    significant: bool

    @property
    def ratio(self) -> float:
        return self.after_ms / self.before_ms


Row = Measurement | NetworkMeasurement


def _key(row: Row) -> tuple[object, ...]:
    operation = row.operation if isinstance(row, Measurement) else "step"
    return (row.work, operation, row.provider)


def _name(row: Row) -> str:
    if isinstance(row, Measurement):
        return f"{work_name(row)}, {row.operation}, {row.provider}"
    return f"{row.network} batch {row.batch} {row.dtype} {row.memory_format}, step, {row.provider}"


def _timed(results: Results) -> dict[tuple[object, ...], Row]:
    """Rows with a time, by what they measure; the first where suites share a work."""
    rows: Iterable[Row] = (*results.measurements, *results.networks)
    found: dict[tuple[object, ...], Row] = {}
    for row in rows:
        if row.median_ms is not None and row.p20_ms is not None and row.p80_ms is not None:
            found.setdefault(_key(row), row)
    return found


def _change(old: Row, new: Row) -> Change:
    a = (old.p20_ms or 0.0, old.median_ms or math.nan, old.p80_ms or 0.0)
    b = (new.p20_ms or 0.0, new.median_ms or math.nan, new.p80_ms or 0.0)
    ratio = b[1] / a[1]
    apart = b[0] > a[2] or a[0] > b[2]
    noise = max((t[2] - t[0]) / (2 * t[1]) for t in (a, b))
    against = new.ratio / old.ratio if new.ratio and old.ratio else None
    return Change(
        name=_name(new), before_ms=a[1], after_ms=b[1], noise=noise, against_torch=against,
        significant=apart and abs(math.log(ratio)) > math.log1p(max(SMALLEST, noise)),
    )  # fmt: skip


def changes(before: Results, after: Results) -> list[Change]:
    """Everything that both runs timed, the largest slowdown first."""
    old, new = _timed(before), _timed(after)
    found = [_change(old[key], new[key]) for key in old if key in new]
    return sorted(found, key=lambda change: -change.ratio)


def slower(found: Iterable[Change]) -> list[Change]:
    """The significant slowdowns."""
    return [change for change in found if change.significant and change.ratio > 1]


def lost(before: Results, after: Results) -> list[str]:
    """What was measured before and failed or went wrong after, a sentence each."""
    old = _timed(before)
    rows: Iterable[Row] = (*after.measurements, *after.networks)
    return [
        f"{_name(row)}: {row.status}: {row.message}"
        for row in rows
        if _key(row) in old and row.status in ("failed", "wrong")
    ]


_COMPARED = ("cpu", "cores", "threads", "isa", "device", "platform", "torch", "cuda", "cudnn")


def differences(before: Environment, after: Environment) -> Iterator[str]:
    """Where the two runs' machines or versions differ: then the change is not the code's alone."""
    for name in _COMPARED:
        a, b = getattr(before, name), getattr(after, name)
        if a != b:
            yield f"{name}: {a} before, {b} after"
    gpus = [e.gpu.name if e.gpu else None for e in (before, after)]
    if gpus[0] != gpus[1]:
        yield f"gpu: {gpus[0]} before, {gpus[1]} after"
    for name in sorted({*before.packages, *after.packages}):
        versions = before.packages.get(name), after.packages.get(name)
        if versions[0] != versions[1]:
            yield f"{name}: {versions[0]} before, {versions[1]} after"


def _table(found: Iterable[Change]) -> str:
    body = [
        [
            change.name,
            f"{change.before_ms:.4g}",
            f"{change.after_ms:.4g}",
            f"{100 * (change.ratio - 1):+.0f}%",
            f"±{100 * change.noise:.0f}%",
            "" if change.against_torch is None else f"{100 * (change.against_torch - 1):+.0f}%",
        ]
        for change in found
    ]
    head = ["work", "before ms", "after ms", "change", "noise", "against torch's"]
    align = ("left", *("right" for _ in head[1:]))
    return tabulate(body, headers=head, tablefmt="simple", colalign=align, disable_numparse=True)


def report(before: Results, after: Results) -> tuple[str, bool]:
    """The comparison in words, and whether something became slower or stopped working."""
    found, failures = changes(before, after), lost(before, after)
    worse = slower(found)
    better = [change for change in found if change.significant and change.ratio < 1]
    paragraphs = []
    other = list(differences(before.environment, after.environment))
    if other:
        lines = ["The runs differ in more than the code:", *(f"  {line}" for line in other)]
        paragraphs.append("\n".join(lines))
    paragraphs += [f"slower\n\n{_table(worse)}"] if worse else []
    paragraphs += [f"faster\n\n{_table(reversed(better))}"] if better else []
    paragraphs += ["\n".join(["no longer measured", *failures])] if failures else []
    same = len(found) - len(worse) - len(better)
    only = len(_timed(before)) - len(found), len(_timed(after)) - len(found)
    paragraphs.append(
        f"{len(found)} times compared: {len(worse)} slower, {len(better)} faster, {same} within "
        f"{100 * SMALLEST:.0f} % or the noise; {only[0]} only before, {only[1]} only after"
    )
    return "\n\n".join(paragraphs) + "\n", bool(worse or failures)
