"""How long calls take, several interleaved, by medians and percentiles; and how much memory.

Calls are timed in one process, interleaved in shuffled order, so that a change of clock or load
affects all of them. Three ways to take one sample:

* ``wall``: the wall clock around a number of calls, for CPU tensors;
* ``graph``: CUDA events around the replay of a CUDA graph that holds one call for each of several
  copies of the inputs, together larger than three times the last-level cache, so that every call
  reads from device memory; launch overhead is not in it;
* ``stream``: the wall clock around calls made from Python on a GPU, with a synchronization at
  either end, for tensors so small that launching is what costs.

A call is a function of one argument, the index of the copy of the inputs to use. It must not read
values on the host, which a CUDA graph cannot capture.
"""

import functools
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from speed.results import Method

Call = Callable[[int], object]
Within = Callable[[], AbstractContextManager[Any]]

_SHORTEST_SAMPLE_MS = 0.5
_MOST_CALLS = 4096
_FEWEST_ROUNDS = 3
_MOST_COPIES = 256
# A measurement ends early once it has taken this many times its budget: the machine became slower
# than it was when the samples were counted out.
_PATIENCE = 2.0
# Clock cycles that keep the device busy while the host enqueues the events and the graph.
_BACKLOG_CYCLES = 200_000


@dataclass(frozen=True)
class Settings:
    """How much is measured."""

    budget_s: float = 1.5  # for the samples of one operation, all providers together
    min_rounds: int = 5  # fewest and most samples of a provider
    max_rounds: int = 100
    seed: int = 20250505  # of inputs and noise


def sentence(error: Exception) -> str:
    """The exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


class Timing(NamedTuple):
    """Milliseconds a call, over samples."""

    median_ms: float
    p20_ms: float  # percentiles of the samples
    p80_ms: float
    rounds: int  # samples taken
    calls: int  # in one sample, whose mean the sample is
    warm_up: int = 0  # calls before the first sample

    @classmethod
    def of(cls, samples: list[float], calls: int, warm_up: int = 0) -> "Timing":
        """The summary of samples in milliseconds a call; at least one is needed."""
        several = len(samples) > 1
        cuts = statistics.quantiles(samples, n=5, method="inclusive") if several else samples * 4
        return cls(statistics.median(samples), cuts[0], cuts[3], len(samples), calls, warm_up)


def copies_beyond_cache(bytes_each: int, device: torch.device) -> int:
    """How many copies of inputs of that size exceed three times the L2 cache of a CUDA device
    together, at most 256 (smaller inputs are bound by launches anyway); 1 on a CPU."""
    if device.type != "cuda":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(1, min(_MOST_COPIES, math.ceil(3 * cache / max(bytes_each, 1))))


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream that graphs are captured and replayed on, one for a device.

    To measure a backward pass alone, run its forward pass on this stream: autograd runs a backward
    node on the stream of its forward, and a capture cannot wait for another stream.
    """
    return torch.cuda.Stream(device)


class _Sampler(NamedTuple):
    """A way to take a sample."""

    sample: Callable[[], float]  # takes one; milliseconds a call
    calls: int  # in it
    estimate_s: float  # seconds that taking one costs
    warm_up: int  # calls that were made to find this out


def _wall(call: Call, device: torch.device, copies: int) -> _Sampler:
    """Wall clock around as many calls as a sample needs to be longer than the clock's noise."""

    def sample(calls: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for i in range(calls):
            call(i % copies)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1e3 / calls

    call(0)  # what happens once: compilation, allocation
    calls, each = 1, sample(1)
    warm_up = 2
    while calls < _MOST_CALLS and each * calls < _SHORTEST_SAMPLE_MS:
        calls = min(_MOST_CALLS, max(2 * calls, math.ceil(_SHORTEST_SAMPLE_MS / max(each, 1e-6))))
        each = sample(calls)
        warm_up += calls
    return _Sampler(lambda: sample(calls), calls, each * calls * 1e-3, warm_up)


def _graph(call: Call, device: torch.device, copies: int) -> _Sampler:
    """CUDA events around replays of a graph that turns once through all copies, captured after two
    turns outside it; RuntimeError where something in the call cannot be captured."""
    with torch.cuda.device(device):
        stream = capture_stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for turn in range(2 * copies):
                call(turn % copies)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for copy in range(copies):
                call(copy)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def sample(replays: int) -> float:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                torch.cuda._sleep(_BACKLOG_CYCLES)
                first.record(stream)
                for _ in range(replays):
                    graph.replay()
                last.record(stream)
                last.synchronize()
            return float(first.elapsed_time(last)) / (replays * copies)

        once = sample(1) * copies
        replays = max(1, math.ceil(_SHORTEST_SAMPLE_MS / max(once, 1e-3)))
        each = sample(replays)
    calls = replays * copies
    # Two turns before the capture, then replays.
    return _Sampler(lambda: sample(replays), calls, each * calls * 1e-3, 3 * copies + calls)


def _turns(
    samplers: Mapping[str, _Sampler], budget_s: float, low: int, high: int
) -> dict[str, int]:
    """How often each is sampled: all have the same share of the time, within limits. One whose
    single sample takes longer than its share is content with three."""
    share = budget_s / max(len(samplers), 1)
    turns = {}
    for name, sampler in samplers.items():
        wanted = int(share / max(sampler.estimate_s, 1e-9))
        turns[name] = min(high, max(low if wanted else min(low, _FEWEST_ROUNDS), wanted))
    return turns


def _samples(
    samplers: Mapping[str, _Sampler],
    turns: Mapping[str, int],
    contexts: Mapping[str, Within],
    low: int,
    seconds: float,
) -> dict[str, list[float] | Exception]:
    """Each call's samples, or what it raised; after ``seconds`` only the first ``low`` of each."""
    samples: dict[str, list[float]] = {name: [] for name in samplers}
    failures: dict[str, list[float] | Exception] = {}
    total = max(turns.values(), default=0)
    shuffled = random.Random(total)
    end = time.perf_counter() + seconds
    for turn in range(total):
        due = [n for n, k in turns.items() if (turn + 1) * k // total > turn * k // total]
        if time.perf_counter() > end:
            due = [n for n, k in turns.items() if len(samples[n]) < min(k, low)]
        shuffled.shuffle(due)
        for name in due:
            if name in failures:
                continue
            try:
                with contexts.get(name, nullcontext)():
                    samples[name].append(samplers[name].sample())
            except Exception as error:
                failures[name] = error
    return {**samples, **failures}


def interleaved(
    calls: Mapping[str, Call],
    device: torch.device | str = "cpu",
    *,
    method: Method | None = None,
    copies: int = 1,
    within: Mapping[str, Within] | None = None,
    budget_s: float = 1.0,
    min_rounds: int = 5,
    max_rounds: int = 100,
) -> dict[str, Timing | Exception]:
    """Times calls against each other; of each its timing, or the exception that it raised.

    Each has the same share of the time; one that is slow is sampled less often, spread evenly
    over the whole measurement. The order within a round is shuffled anew for each.

    Args:
        calls: by name; each takes the index of the copy of the inputs to use.
        method: how a sample is taken (see the module); None for "wall" on a CPU and "graph" on a
            GPU.
        copies: how many copies of the inputs there are: :func:`copies_beyond_cache`.
        within: by name, makes a context for each sample (which backend serves, say); it is
            entered before the clock starts.
        budget_s: seconds for all samples together, beyond warm-up and ``min_rounds`` samples each.
        min_rounds, max_rounds: fewest and most samples of one call; three are enough where
            one sample takes longer than the call's share of the time.
    """
    device = torch.device(device)
    method = method or ("wall" if device.type == "cpu" else "graph")
    prepare = _graph if method == "graph" else _wall
    contexts = within or {}
    found: dict[str, Timing | Exception] = {}
    samplers: dict[str, _Sampler] = {}
    for name, call in calls.items():
        try:
            with contexts.get(name, nullcontext)():
                samplers[name] = prepare(call, device, copies)
        except Exception as error:  # whatever a provider raises is its result
            found[name] = error
    turns = _turns(samplers, budget_s, min_rounds, max_rounds)
    samples = _samples(samplers, turns, contexts, min_rounds, _PATIENCE * budget_s)
    for name, taken in samples.items():
        if isinstance(taken, Exception):
            found[name] = taken
        else:
            found[name] = Timing.of(taken, samplers[name].calls, samplers[name].warm_up)
    return {name: found[name] for name in calls}


# Memory


def kept_bytes(call: Callable[[], object]) -> int:
    """Bytes that autograd keeps of a forward pass for its backward pass, each storage once.

    The input and the parameters count where they are kept.
    """
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(storages.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a call has allocated at a time, beyond those allocated before it.

    On a GPU by the caching allocator's statistics, on a CPU by the allocations that torch's
    profiler sees; memory that is taken past torch's allocator is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with _silent_stderr(), torch.autograd.profiler.profile(profile_memory=True) as profile:
        call()
    assert profile.kineto_results is not None
    now = peak = 0
    for event in sorted(profile.kineto_results.events(), key=lambda event: event.start_ns()):
        now += event.nbytes()  # 0 for events that are no allocation and no release
        peak = max(peak, now)
    return peak


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Hides what the profiler's library writes to the process's standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
