"""Reads what is to be reported: benchmark results and studies of scaling, told apart by format."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from normnorm.bench import results, scaling
from normnorm.bench.results import Environment, Results
from normnorm.bench.scaling import Scaling

__all__ = ["Source", "Sources", "read"]


@dataclass(frozen=True)
class Source:
    """A benchmark run and where it was read from.

    Attributes:
        path: the file; None for results that are not kept in one.
        results: what it holds.
    """

    path: Path | None
    results: Results

    @property
    def environment(self) -> Environment:
        return self.results.environment

    @property
    def name(self) -> str:
        """The machine in a few words."""
        around = self.environment
        if around.gpu is not None:
            return around.device_name
        return f"{around.device_name}, {around.threads} thread{'s' * (around.threads != 1)}"


@dataclass
class Sources:
    """Everything that one report is about.

    Attributes:
        runs: benchmark runs, in the order given.
        studies: studies of scaling with their files.
    """

    runs: list[Source] = field(default_factory=list)
    studies: list[tuple[Path, Scaling]] = field(default_factory=list)

    def names(self) -> list[str]:
        """A name for each run, no two the same."""
        names = [run.name for run in self.runs]
        for i, name in enumerate(names):
            if names.count(name) > 1:
                run = self.runs[i]
                where = run.path.stem if run.path else run.environment.timestamp
                names[i] = f"{name} ({where})"
        return names


@dataclass
class _Head:
    format: str


def read(paths: Iterable[str | os.PathLike[str]]) -> Sources:
    """Reads result files and studies.

    Raises:
        ResultsError: one of them cannot be read or is neither; nothing is reported then.
    """
    sources = Sources()
    for path in map(Path, paths):
        if _format(path) == scaling.FORMAT:
            sources.studies.append((path, scaling.load(path)))
        else:
            sources.runs.append(Source(path, results.load(path)))
    return sources


def _format(path: Path) -> str | None:
    """What a file calls itself; None where it does not say, or is no JSON."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Head).format
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
