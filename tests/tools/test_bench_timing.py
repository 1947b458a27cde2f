"""Medians of calls in alternation, and the memory of a call."""

from __future__ import annotations

import itertools
import time
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from bench_samples import CPU

from speed import timing
from speed.timing import Timing, copies_beyond_cache, cuda_graph, interleaved

# Timing


def test_percentiles_are_numpys():
    samples = [3.0, 1.0, 7.0, 2.0, 9.0, 4.0]
    timing = Timing.of(samples, 5)
    expected = np.percentile(samples, [50, 20, 80])
    assert (timing.median_ms, timing.p20_ms, timing.p80_ms) == pytest.approx(tuple(expected))
    assert (timing.rounds, timing.calls) == (6, 5)
    assert Timing.of([3.0], 1, 2) == (3.0, 3.0, 3.0, 1, 1, 2)


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def call(self, name, seconds):
        def run(copy):
            self.now += seconds() if callable(seconds) else seconds
            self.log.append((name, copy))

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_medians_of_calls_in_alternation(clock):
    durations = itertools.cycle([1e-3, 3e-3, 2e-3])
    calls = {
        "fast": clock.call("fast", 1e-6),
        "varying": clock.call("varying", lambda: next(durations)),
        "slow": clock.call("slow", 0.1),
    }
    found = interleaved(calls, budget_s=1.5, min_rounds=4, max_rounds=50)
    assert list(found) == list(calls)
    assert found["fast"].median_ms == pytest.approx(1e-3)
    assert found["fast"].calls >= 500  # a sample is longer than what a clock can tell
    assert found["varying"].median_ms == pytest.approx(2.0)
    assert found["varying"].rounds == 50
    assert found["varying"].warm_up == 2
    assert found["slow"].rounds == 5  # a third of the time
    # The slow one's samples are spread over the whole measurement, not done first.
    log = [name for name, _ in clock.log]
    first = log.index("slow", log.index("slow") + 2)
    between = [len([n for n in log[i:j] if n == "varying"]) for i, j in itertools.pairwise(
        [i for i, n in enumerate(log) if n == "slow" and i >= first])]  # fmt: skip
    assert min(between) >= 5


def test_a_machine_that_becomes_slow_ends_the_measurement_early(clock):
    """A hundred samples were counted out, each then takes a thousand times as long."""
    durations = itertools.chain([1e-3] * 5, itertools.repeat(1.0))
    calls = {
        "a": clock.call("a", lambda: next(durations)), "b": clock.call("b", lambda: next(durations))
    }  # fmt: skip
    found = interleaved(calls, budget_s=2.0, min_rounds=4)
    assert found["a"].rounds + found["b"].rounds <= 10
    assert min(found["a"].rounds, found["b"].rounds) >= 4


def test_what_takes_longer_than_its_share_is_sampled_three_times(clock):
    calls = {"a": clock.call("a", 1e-3), "slow": clock.call("slow", 10.0)}
    found = interleaved(calls, budget_s=1.0, min_rounds=7)
    assert found["slow"].rounds == 3
    assert found["a"].rounds >= 7


def test_contexts_surround_samples_outside_the_clock(clock):
    @contextmanager
    def context():
        clock.now += 1.0
        yield
        clock.now += 1.0

    calls = {"inside": clock.call("inside", 2e-3), "bare": clock.call("bare", 2e-3)}
    found = interleaved(calls, within={"inside": context}, budget_s=0.1)
    assert found["inside"].median_ms == pytest.approx(2.0)
    assert found["bare"].median_ms == pytest.approx(2.0)


def test_every_copy_of_the_inputs_has_its_turn(clock):
    interleaved({"a": clock.call("a", 1e-4)}, copies=3, budget_s=0.01)
    assert {copy for _, copy in clock.log} == {0, 1, 2}


def test_a_call_that_raises_is_returned_and_the_others_are_timed(clock):
    def at_once(copy):
        raise ValueError("no")

    count = itertools.count()

    def later(copy):
        clock.now += 1e-3
        if next(count) > 5:
            raise ValueError("no more")

    calls = {"at once": at_once, "later": later, "fine": clock.call("fine", 1e-3)}
    found = interleaved(calls, budget_s=0.1)
    assert str(found["at once"]) == "no"
    assert str(found["later"]) == "no more"
    assert found["fine"].median_ms == pytest.approx(1.0)


def test_real_time_is_measured_in_milliseconds():
    found = interleaved({"nap": lambda copy: time.sleep(0.003)}, budget_s=0.05)
    assert 3.0 <= found["nap"].median_ms < 30
    assert copies_beyond_cache(8, CPU) == 1


@pytest.fixture
def pretended_gpu(clock, monkeypatch):
    """What the timer asks of torch.cuda, kept by the fake clock: a replay takes a millisecond for
    each call that was captured, and nothing passes on the host."""

    class Graph:
        def replay(self):
            clock.now += 1e-3 * self.calls
            clock.replays += 1

    @contextmanager
    def capture(graph, stream):
        before = len(clock.log)
        yield
        graph.calls = len(clock.log) - before

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self, stream):
            self.at = clock.now

        def synchronize(self):
            pass

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    class Stream:
        def __init__(self, device=None):
            pass

        def wait_stream(self, other):
            pass

        def synchronize(self):
            pass

    def sleep(cycles):
        clock.now += 1e-4  # before the first event: in no sample

    clock.replays = 0
    pretended = {
        "Stream": Stream, "current_stream": lambda device: Stream(), "CUDAGraph": Graph,
        "graph": capture, "Event": Event, "_sleep": sleep, "synchronize": lambda device: None,
        "stream": lambda stream: nullcontext(), "device": lambda device: nullcontext(),
        "get_device_properties": lambda device: type("P", (), {"L2_cache_size": 60 << 20}),
    }  # fmt: skip
    for name, fake in pretended.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    timing.capture_stream.cache_clear()
    yield clock
    timing.capture_stream.cache_clear()


def test_graphs_hold_a_call_for_each_copy(pretended_gpu):
    clock, device = pretended_gpu, torch.device("cuda")
    assert copies_beyond_cache(50 << 20, device) == 4
    assert copies_beyond_cache(200 << 20, device) == 1
    assert copies_beyond_cache(16, device) == 256
    found = interleaved(
        {"a": clock.call("a", 0.0)}, device, copies=4, budget_s=0.04, min_rounds=3, max_rounds=8
    )
    assert clock.log == [("a", copy) for _ in range(3) for copy in range(4)]  # 2 turns, 1 capture
    assert found["a"].median_ms == pytest.approx(1.0)
    assert found["a"].calls == 4
    assert found["a"].rounds == 8
    assert clock.replays == 2 + 8
    assert found["a"].warm_up == 2 * 4 + 2 * 4


def test_launches_are_timed_from_the_host(pretended_gpu):
    clock = pretended_gpu
    calls = {"a": clock.call("a", 2e-5)}
    found = interleaved(calls, torch.device("cuda"), method="stream", budget_s=0.01)
    assert found["a"].median_ms == pytest.approx(0.02)
    assert found["a"].calls >= 25
    assert clock.replays == 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_time_the_device_and_rotate_over_more_than_the_cache():
    device = torch.device("cuda")
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    each = 1 << 22
    copies = copies_beyond_cache(each, device)
    assert 3 * cache <= copies * each < 3 * cache + each
    xs = [torch.randn(each // 4, device=device) for _ in range(copies)]
    seen = torch.zeros(copies, device=device)

    def call(copy):
        seen[copy] += 1
        return xs[copy] * 2

    cuda_graph(call, copies, device).replay()
    torch.cuda.synchronize()
    assert (seen == 3).all()  # two turns before the capture, and one replay
    found = interleaved({"graph": call}, device, copies=copies, budget_s=0.2)
    assert 1e-4 < found["graph"].median_ms < 1


# Memory


def test_kept_bytes_count_each_storage_once():
    x = torch.randn(10, 20, requires_grad=True)
    assert timing.kept_bytes(lambda: x * x) == 800
    y = torch.randn(10, 20)
    assert timing.kept_bytes(lambda: (x * y, x * 3.0)) == 800


def test_peak_bytes_of_a_chain_of_temporaries(capfd):
    x = torch.randn(1000)
    assert timing.peak_bytes(lambda: x.clone(), CPU) == 4000
    assert timing.peak_bytes(lambda: x.clone().clone().clone(), CPU) == 8000
    assert timing.peak_bytes(lambda: [x.clone(), x.clone(), x.clone()], CPU) == 12000
    assert timing.peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""
