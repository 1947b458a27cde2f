"""How cost grows: against elements, groups, group size and threads, with fitted exponents.

Each sweep varies one thing and keeps the others where it can. All its points, of every provider,
are timed in alternation by :func:`normnorm.bench.timing.interleaved`. A power law with a constant
before it, ``t = offset + coefficient x^exponent``, is fitted to the logarithms; the offset is
what a call costs before it does anything.

A study is kept as JSON: ``{"format": "normnorm-scaling", "version": 1, "environment": {...},
"sweeps": [...], "collectives": [...]}``; the classes here are its schema.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec
import torch

from normnorm.bench.case import Case
from normnorm.bench.gloo import CollectiveCheck
from normnorm.bench.providers import PROVIDERS
from normnorm.bench.results import Environment, ResultsError, write_atomically
from normnorm.bench.timing import Call, Timing, interleaved
from normnorm.bench.work import Work

__all__ = [
    "FORMAT",
    "SEED",
    "VERSION",
    "Fit",
    "Plan",
    "Point",
    "Scaling",
    "Sweep",
    "fit_power_law",
    "load",
    "plans",
    "save",
    "sweep",
]

FORMAT = "normnorm-scaling"
VERSION = 1

Against = Literal["elements", "groups", "group size", "threads"]
SEED = 20250505  # of the random inputs
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Point:
    """One provider's time at one value of what is varied.

    Attributes:
        x: the value.
        median_ms, p20_ms, p80_ms: milliseconds a call, over ``rounds`` samples.
    """

    x: float
    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int


@dataclass(frozen=True, kw_only=True)
class Fit:
    """``t = offset_ms + coefficient_ms x^exponent``, fitted to log t.

    Attributes:
        exponent, low, high: with its 95 % confidence interval, from the residuals; None where
            the points are too few to leave any.
        offset_ms: 0 where no constant was fitted.
        coefficient_ms: the time at x = 1 without the offset.
        residual: root mean square of the relative residuals.
    """

    exponent: float
    low: float | None
    high: float | None
    offset_ms: float
    coefficient_ms: float
    residual: float

    def __call__(self, x: float) -> float:
        """Milliseconds at x."""
        return float(self.offset_ms + self.coefficient_ms * x**self.exponent)


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """Times of one layer and provider against one thing.

    Attributes:
        against: what is varied.
        layer: the normality layer's class; torch's counterpart where the provider is torch's.
        kept: in words, what stays the same.
        provider: as in a benchmark's measurements.
        points: in rising order of x.
        fit: of these points.
    """

    against: Against
    layer: str
    kept: str
    provider: str
    points: tuple[Point, ...]
    fit: Fit


@dataclass(kw_only=True)
class Scaling:
    """A study.

    Attributes:
        environment: where and how.
        sweeps: of the layers.
        collectives: all-reduces between processes of this machine, predicted and measured.
    """

    environment: Environment
    sweeps: list[Sweep] = field(default_factory=list)
    collectives: list[CollectiveCheck] = field(default_factory=list)


def fit_power_law(x: Sequence[float], milliseconds: Sequence[float], offset: bool = True) -> Fit:
    """Fits the logarithm of the time by least squares.

    Args:
        x: positive values, at least two of them different.
        milliseconds: positive times, one for each.
        offset: whether a constant is fitted beside the power; never with fewer than five points.

    Raises:
        ValueError: too few points, or numbers that have no logarithm.
    """
    import numpy as np
    from scipy.optimize import least_squares
    from scipy.stats import t as student

    if len(x) != len(milliseconds) or len(set(x)) < 2:
        raise ValueError(f"two different x are needed for a power law, got {sorted(set(x))}")
    if min(*x, *milliseconds) <= 0:
        raise ValueError("a power law is fitted to positive numbers only")
    log_x, log_t = np.log(np.array(x, float)), np.log(np.array(milliseconds, float))
    exponent, intercept = np.polyfit(log_x, log_t, 1)
    start, bounds = [exponent, intercept], ([-np.inf] * 2, [np.inf] * 2)
    offset = offset and len(x) >= 5
    if offset:
        start = [max(exponent, 0.1), log_t[-1] - max(exponent, 0.1) * log_x[-1], 0.5]
        bounds = ([-np.inf, -np.inf, 0.0], [np.inf, np.inf, 1.5])
    shortest = float(np.exp(log_t.min()))

    def constant(parameters: np.ndarray) -> float:
        """In units of the shortest time, which lets the solver step alike in all directions."""
        return float(parameters[2]) * shortest if offset else 0.0

    def residuals(parameters: np.ndarray) -> np.ndarray:
        power = parameters[0] * log_x + parameters[1]
        if not offset:
            return power - log_t
        return np.logaddexp(power, np.log(max(constant(parameters), 1e-300))) - log_t

    found = least_squares(residuals, start, bounds=bounds, x_scale="jac")
    freedom = len(x) - len(start)
    half = None
    if freedom > 0:
        variance = 2 * found.cost / freedom
        covariance = np.linalg.pinv(found.jac.T @ found.jac) * variance
        half = student.ppf(0.5 + _CONFIDENCE / 2, freedom) * math.sqrt(covariance[0, 0])
    value = float(found.x[0])
    return Fit(
        exponent=value,
        low=None if half is None else float(value - half),
        high=None if half is None else float(value + half),
        offset_ms=constant(found.x),
        coefficient_ms=float(np.exp(found.x[1])),
        residual=float(np.sqrt(np.mean(np.square(found.fun)))),
    )


@dataclass(frozen=True)
class Plan:
    """A sweep to come.

    Attributes:
        against, kept: as in :class:`Sweep`.
        works: by the value of what is varied, in rising order.
    """

    against: Against
    kept: str
    works: tuple[tuple[float, Work], ...]


def _work(layer: str, *shape: int) -> Work:
    return Work(layer=layer, shape=shape, suite="scaling", operations=("full",))


def plans(largest: int = 1 << 24, threads: int | None = None) -> Iterator[Plan]:
    """The sweeps of a study, over a row layer and a channel layer.

    Args:
        largest: elements of the largest input; at least 2^16.
        threads: the most threads; None for as many as the process may use.

    Raises:
        ValueError: an input so small that too few points are left.
    """
    if largest < 1 << 16:
        raise ValueError(f"the largest input must have at least 65536 elements, got {largest}")
    top = largest.bit_length() - 1
    powers = range(10, top + 1)
    batch, rows = "BatchNormalNorm2d", "LayerNormalNorm"
    images = [(p, _square(2 ** (p - p // 2))) for p in powers]
    yield Plan(
        "elements", "groups and group size grow alike, 16 images",
        tuple((2**p, _work(batch, 16, 2 ** (p // 2 - 4), *size)) for p, size in images),
    )  # fmt: skip
    yield Plan(
        "elements", "groups and group size grow alike",
        tuple((2**p, _work(rows, 2 ** (p // 2), 2 ** (p - p // 2))) for p in powers),
    )  # fmt: skip
    counts = [2 ** (p - 10) for p in powers]
    yield Plan(
        "groups", "1024 elements a group",
        tuple((n, _work(batch, 4, n, 16, 16)) for n in counts),
    )  # fmt: skip
    yield Plan("groups", "1024 elements a group", tuple((n, _work(rows, n, 1024)) for n in counts))
    total = min(top, 20)
    sizes = range(6, total - 3, 2)
    yield Plan(
        "group size", f"{2**total} elements in all",
        tuple((2**p, _work(batch, 4, 2 ** (total - p), *_square(2 ** (p - 2)))) for p in sizes),
    )  # fmt: skip
    yield Plan(
        "group size", f"{2**total} elements in all",
        tuple((2**p, _work(rows, 2 ** (total - p), 2**p)) for p in sizes),
    )  # fmt: skip
    most = threads or len(os.sched_getaffinity(0))
    counts = sorted({*(2**i for i in range(most.bit_length())), most})
    if len(counts) > 1:
        side = 2 ** ((min(top, 22) - 10) // 2)
        work = _work(batch, 16, 64, side, side)
        yield Plan(
            "threads", f"BatchNormalNorm2d {work.shape_text}", tuple((n, work) for n in counts)
        )
        work = _work(rows, 2 ** (min(top, 22) - 10), 1024)
        yield Plan(
            "threads", f"LayerNormalNorm {work.shape_text}", tuple((n, work) for n in counts)
        )


def _square(size: int) -> tuple[int, int]:
    """Height and width of that many positions, a power of two, as square as may be."""
    height = 2 ** ((size.bit_length() - 1) // 2)
    return height, size // height


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _call(work: Work, provider: str, seed: int, threads: int | None) -> Call:
    """Forward and backward of one provider, on inputs of its own."""
    case = Case(work, torch.device("cpu"), 1, seed)
    chosen = PROVIDERS[provider]
    runner = chosen.build(case)

    def full(copy: int) -> object:
        with chosen.within():
            return runner.full(case.inputs[copy], case.grads[copy])

    def with_threads(copy: int) -> object:
        with _threads(threads or 1):
            return full(copy)

    return full if threads is None else with_threads


def sweep(
    plan: Plan,
    providers: Sequence[str] = ("normnorm-cpu", "torch"),
    *,
    budget_s: float = 10.0,
    seed: int = SEED,
) -> list[Sweep]:
    """Measures a plan on the CPU, forward and backward in training with noise.

    Args:
        providers: names as ``normnorm bench`` has them.
        budget_s: seconds of timing, all points and providers together.
        seed: of the random inputs.

    Raises:
        RuntimeError: a provider failed.
    """
    by_thread = plan.against == "threads"
    calls = {
        (provider, x): _call(work, provider, seed, int(x) if by_thread else None)
        for provider in providers
        for x, work in plan.works
    }
    named = {f"{provider} {x}": call for (provider, x), call in calls.items()}
    found = interleaved(named, "cpu", budget_s=budget_s, min_rounds=5, max_rounds=60)
    sweeps = []
    for provider in providers:
        points = []
        for x, work in plan.works:
            timing = found[f"{provider} {x}"]
            if not isinstance(timing, Timing):
                raise RuntimeError(f"{provider} failed on {work}: {timing}")
            points.append(
                Point(
                    x=float(x), median_ms=timing.median_ms, p20_ms=timing.p20_ms,
                    p80_ms=timing.p80_ms, rounds=timing.rounds,
                )
            )  # fmt: skip
        fit = fit_power_law(
            [p.x for p in points], [p.median_ms for p in points],
            offset=plan.against in ("elements", "groups"),
        )  # fmt: skip
        sweeps.append(
            Sweep(
                against=plan.against, layer=plan.works[0][1].layer, kept=plan.kept,
                provider=provider, points=tuple(points), fit=fit,
            )
        )  # fmt: skip
    return sweeps


@dataclass
class _Head:
    format: str
    version: int


def load(path: str | os.PathLike[str]) -> Scaling:
    """Reads a study.

    Raises:
        ResultsError: the file cannot be read, is damaged, is of another kind or of a newer
            version.
    """
    try:
        text = Path(path).read_bytes()
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror or error}") from None
    try:
        head = msgspec.json.decode(text, type=_Head)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is no study of scaling: {error}") from None
    if head.format != FORMAT:
        raise ResultsError(
            f'{path} is no study of scaling: its format is {head.format!r}, not "{FORMAT}"'
        )
    if head.version != VERSION:
        raise ResultsError(
            f"{path} is of version {head.version} of the format; this normnorm reads {VERSION}"
        )
    try:
        return msgspec.json.decode(text, type=Scaling)
    except (msgspec.ValidationError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} is damaged: {error}") from None


def save(scaling: Scaling, path: str | os.PathLike[str]) -> None:
    """Writes a study, whole or not at all.

    Raises:
        ResultsError: it cannot be written there; what stood there is unchanged.
    """
    data = {"format": FORMAT, "version": VERSION, **msgspec.to_builtins(scaling)}
    text = msgspec.json.format(msgspec.json.encode(data), indent=1)
    write_atomically(path, text + b"\n")
