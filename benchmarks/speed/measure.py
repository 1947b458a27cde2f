"""Measures layers and networks: every provider is checked against the float64 reference, then
timed, interleaved with the others; results are on disk after each work."""

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from speed import environment
from speed.case import Case, Runner, bound, worst_error
from speed.counts import count_cuda
from speed.networks import Network, measure_network
from speed.providers import PROVIDERS, Provider, Unavailable
from speed.results import Measurement, Operation, Results, Row, Status, save, with_ratios
from speed.timing import (
    Call,
    Settings,
    Timing,
    capture_stream,
    copies_beyond_cache,
    interleaved,
    kept_bytes,
    peak_bytes,
    sentence,
)
from speed.work import Work


class Run:
    """A run in progress: its results so far, kept in a file too."""

    def __init__(
        self, device: torch.device, settings: Settings, file: Path | None,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """``say`` gets each sentence about something that failed or was wrong, once."""
        self._device, self._settings, self._file, self._say = device, settings, file, say
        self._started = time.monotonic()
        around = environment.before(device, settings.seed)
        counts = count_cuda(around.gpu.capability) if around.gpu else []
        self.results = Results(environment=around, counts=counts)

    def layer(self, work: Work, providers: Sequence[str]) -> Sequence[Row]:
        """A work's rows; none, but a problem, where its inputs do not fit into memory."""
        try:
            rows = measure(work, providers, self._device, self._settings)
        except (RuntimeError, MemoryError) as error:
            self.problem(f"{work}: not measured: {sentence(error)}")
            return []
        self.results.measurements += rows
        return self._keep(rows, str(work))

    def network(self, network: Network, providers: Sequence[str]) -> Sequence[Row]:
        rows = measure_network(network, providers, self._device, self._settings)
        self.results.networks += rows
        return self._keep(rows, str(network))

    def _keep(self, rows: Sequence[Row], name: str) -> Sequence[Row]:
        for row in rows:
            if row.status in ("failed", "wrong"):
                self.problem(f"{row.provider} on {name}: {row.status}: {row.message}")
        self._save()
        return rows

    def _save(self) -> None:
        if self._file is not None:
            save(self.results, self._file)

    def problem(self, words: str) -> None:
        if words not in self.results.problems:
            self.results.problems.append(words)
            self._say(words)

    def finish(self, complete: bool) -> None:
        """Adds the run's duration, and load and clocks at its end."""
        seconds = time.monotonic() - self._started
        around = environment.after(self.results.environment, self._device, seconds)
        self.results.environment = around
        self.results.complete = complete
        self._save()


@dataclass
class _Candidate:
    """A provider during one work: what is known of it so far."""

    provider: Provider
    runner: Runner | None = None
    status: Status = "ok"
    message: str | None = None
    error: float | None = None
    bound: float | None = None
    kept: int | None = None
    peaks: dict[Operation, int] = field(default_factory=dict)
    timings: dict[Operation, Timing] = field(default_factory=dict)

    def fail(self, status: Status, message: str) -> None:
        self.status, self.message, self.runner = status, message, None

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """The provider's context; whatever it raises is its result."""
        try:
            with self.provider.within():
                yield
        except Unavailable as reason:
            self.fail("unavailable", str(reason))
        except Exception as failure:
            self.fail("failed", sentence(failure))


def measure(
    work: Work, providers: Sequence[str], device: torch.device, settings: Settings
) -> list[Measurement]:
    """Rows for each operation and provider, in that order.

    A provider that raises, is wrong or does not do this work leaves rows that say so; the others
    are measured all the same.
    """
    stream: AbstractContextManager[Any] = nullcontext()
    if device.type == "cuda":
        stream = torch.cuda.stream(capture_stream(device))
    candidates = [_Candidate(PROVIDERS[name]) for name in providers]
    if any(candidate.provider.compiled for candidate in candidates):
        torch.compiler.reset()  # or the ninth shape of a function would run in eager mode
    with stream, torch.random.fork_rng([device] if device.type == "cuda" else []):
        copies = 1
        if work.method == "graph":
            each = work.elements * work.torch_dtype.itemsize
            copies = copies_beyond_cache(each * (1 if work.mode == "eval" else 2), device)
        case = Case(work, device, copies, settings.seed)
        expected: dict[bool, dict[str, Tensor]] = {}
        for candidate in candidates:
            with candidate.attempt():
                candidate.runner = candidate.provider.build(case)
                _check(candidate, case, expected)
                _remember_memory(candidate, case)
        for operation in work.operations:
            _time(candidates, case, operation, settings)
        for candidate in candidates:  # again, after thousands of calls
            with candidate.attempt():
                _check(candidate, case, expected, "after it was timed, ")
        rows: list[Measurement] = []
        for operation in work.operations:
            rows += with_ratios(
                _row(candidate, work, operation)
                for candidate in candidates
                if candidate.provider.name != "copy" or operation == "forward"
            )
    del case, candidates, expected
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return rows


def _check(
    candidate: _Candidate, case: Case, expected: dict[bool, dict[str, Tensor]], when: str = ""
) -> None:
    """Sets a provider's result beside the float64 reference; one that is too far off is wrong, and
    has no times.

    Args:
        expected: the reference's results, filled in as they are needed: with the transform and
            without.
        when: the words that its message begins with.
    """
    runner, normality = candidate.runner, candidate.provider.normality
    if runner is None:
        return
    if candidate.provider.name == "copy":
        candidate.bound = 0.0
        error = 0.0 if runner.forward(case.inputs[0]).equal(case.inputs[0]) else 1.0
        wrong = "its copy differs from the input"
    else:
        candidate.bound = bound(case.work) + candidate.provider.allowance(case)
        got = case.result(runner, case.seed)
        if normality not in expected:
            expected[normality] = case.expected(normality, case.seed)
        name, error = worst_error(got, expected[normality])
        allowed = f"{candidate.bound:.1e} is allowed"
        wrong = f"its {name} is off by {error:.1e} of the largest value; {allowed}"
    candidate.error = max(error, candidate.error or 0.0)
    if error > candidate.bound:
        candidate.fail("wrong", when + wrong)
        candidate.timings.clear()


def _remember_memory(candidate: _Candidate, case: Case) -> None:
    runner = candidate.runner
    if runner is None or candidate.provider.name == "copy":
        return
    x, grad = case.inputs[0], case.grads[0]
    if case.work.mode != "eval":
        candidate.kept = kept_bytes(lambda: runner.forward(x))
        candidate.peaks["full"] = peak_bytes(lambda: runner.full(x, grad), case.device)
    with torch.set_grad_enabled(case.work.mode != "eval"):
        candidate.peaks["forward"] = peak_bytes(lambda: runner.forward(x), case.device)


def _call(runner: Runner, case: Case, operation: Operation) -> Call:
    """The operation as a function of the copy to use."""
    inputs, grads = case.inputs, case.grads
    if operation == "full":
        return lambda i: runner.full(inputs[i], grads[i])
    if operation == "backward":
        outputs = [runner.forward(x) for x in inputs]
        return lambda i: runner.gradients(outputs[i], inputs[i], grads[i])
    return lambda i: runner.forward(inputs[i])


def _time(
    candidates: Sequence[_Candidate], case: Case, operation: Operation, settings: Settings
) -> None:
    """Times one operation of all providers that are still in."""
    calls: dict[str, Call] = {}
    within: dict[str, Callable[[], AbstractContextManager[Any]]] = {}
    by_name = {candidate.provider.name: candidate for candidate in candidates}
    with torch.set_grad_enabled(case.work.mode != "eval"):
        for name, candidate in by_name.items():
            if candidate.runner is None or (name == "copy" and operation != "forward"):
                continue
            within[name] = candidate.provider.within
            with candidate.attempt():
                calls[name] = _call(candidate.runner, case, operation)
        found = interleaved(
            calls, case.device, method=case.work.method, copies=case.copies, within=within,
            budget_s=settings.budget_s, min_rounds=settings.min_rounds,
            max_rounds=settings.max_rounds,
        )  # fmt: skip
    for name, timing in found.items():
        if isinstance(timing, Timing):
            by_name[name].timings[operation] = timing
        else:
            by_name[name].fail("failed", sentence(timing))


_OF_WORK = (
    "layer", "shape", "groups", "dtype", "memory_format", "mode", "method", "suite", "x_name",
    "x_value",
)  # fmt: skip


def _row(candidate: _Candidate, work: Work, operation: Operation) -> Measurement:
    timing = candidate.timings.get(operation)
    return Measurement(
        provider=candidate.provider.name, operation=operation, status=candidate.status,
        message=candidate.message, model_bytes=work.model_bytes(operation),
        kept_bytes=candidate.kept, peak_bytes=candidate.peaks.get(operation),
        error=candidate.error, bound=candidate.bound, **(timing._asdict() if timing else {}),
        **{name: getattr(work, name) for name in _OF_WORK},
    )  # fmt: skip
