"""Medians of interleaved calls, and the memory of a call."""

import itertools
import time
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from bench_samples import CPU

from speed import timing
from speed.timing import Timing, copies_beyond_cache, interleaved

# Timing


def test_percentiles_are_numpys():
    samples = [3.0, 1.0, 7.0, 2.0, 9.0, 4.0]
    found = Timing.of(samples, 5)
    assert found[:3] == pytest.approx(tuple(np.percentile(samples, [50, 20, 80])))
    assert found[3:] == (6, 5, 0)
    assert Timing.of([3.0], 1, 2) == (3.0, 3.0, 3.0, 1, 1, 2)


class Clock:
    """Time that passes only when a call says so."""

    def __init__(self):
        self.now = 0.0
        self.log = []

    def call(self, name, seconds):
        def run(copy):
            self.now += next(seconds) if hasattr(seconds, "__next__") else seconds
            self.log.append((name, copy))

        return run


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_medians_of_interleaved_calls(clock):
    calls = {
        "fast": clock.call("fast", 1e-6),
        "varying": clock.call("varying", itertools.cycle([1e-3, 3e-3, 2e-3])),
        "slow": clock.call("slow", 0.1),
    }
    found = interleaved(calls, budget_s=1.5, min_rounds=4, max_rounds=50)
    assert list(found) == list(calls)
    assert found["fast"].median_ms == pytest.approx(1e-3)
    assert found["fast"].calls >= 500  # a sample is longer than what a clock can tell
    assert found["varying"].median_ms == pytest.approx(2.0)
    assert (found["varying"].rounds, found["varying"].warm_up) == (50, 2)
    assert found["slow"].rounds == 5  # a third of the time
    # In rounds without shuffling the two others would alternate.
    log = [name for name, _ in clock.log]
    assert len([n for n, _ in itertools.groupby(log) if n != "slow"]) < 2 * 50
    # The slow one's samples are spread over the whole measurement, not done first.
    at = [i for i, name in enumerate(log) if name == "slow"][2:]
    assert min(log[i:j].count("varying") for i, j in itertools.pairwise(at)) >= 5


def test_a_machine_that_becomes_slow_ends_the_measurement_early(clock):
    """A hundred samples were counted out, each then takes a thousand times as long."""
    durations = itertools.chain([1e-3] * 5, itertools.repeat(1.0))
    calls = {name: clock.call(name, durations) for name in ("a", "b")}
    found = interleaved(calls, budget_s=2.0, min_rounds=4)
    assert found["a"].rounds + found["b"].rounds <= 10
    assert min(found["a"].rounds, found["b"].rounds) >= 4


def test_what_takes_longer_than_its_share_is_sampled_three_times(clock):
    calls = {"a": clock.call("a", 1e-3), "slow": clock.call("slow", 10.0)}
    found = interleaved(calls, budget_s=1.0, min_rounds=7)
    assert found["slow"].rounds == 3
    assert found["a"].rounds >= 7


def test_contexts_are_outside_the_clock_and_every_copy_has_its_turn(clock):
    @contextmanager
    def context():
        clock.now += 1.0
        yield
        clock.now += 1.0

    calls = {"inside": clock.call("inside", 2e-3), "bare": clock.call("bare", 1e-4)}
    found = interleaved(calls, within={"inside": context}, copies=3, budget_s=0.1)
    assert found["inside"].median_ms == pytest.approx(2.0)
    assert found["bare"].median_ms == pytest.approx(0.1)
    assert {copy for name, copy in clock.log if name == "bare"} == {0, 1, 2}


def test_a_call_that_raises_is_returned_and_the_others_are_timed(clock):
    def failing(after):
        count = itertools.count()

        def call(copy):
            clock.now += 1e-3
            if next(count) >= after:
                raise ValueError(f"no more than {after}")

        return call

    calls = {"at once": failing(0), "later": failing(6), "fine": clock.call("fine", 1e-3)}
    found = interleaved(calls, budget_s=0.1)
    assert [str(found[name]) for name in ("at once", "later")] == [
        "no more than 0", "no more than 6"
    ]  # fmt: skip
    assert found["fine"].median_ms == pytest.approx(1.0)


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
            self.synchronize = lambda: None

        def record(self, stream):
            self.at = clock.now

        def elapsed_time(self, end):
            return (end.at - self.at) * 1e3

    def stream(device=None):
        return SimpleNamespace(wait_stream=lambda other: None, synchronize=lambda: None)

    def sleep(cycles):
        clock.now += 1e-4  # before the first event: in no sample

    clock.replays = 0
    for name, fake in {
        "Stream": stream, "current_stream": stream, "CUDAGraph": Graph, "graph": capture,
        "Event": Event, "_sleep": sleep, "synchronize": lambda device: None,
        "stream": nullcontext, "device": nullcontext,
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=60 << 20),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, fake)
    timing.capture_stream.cache_clear()
    yield clock
    timing.capture_stream.cache_clear()


def test_graphs_hold_a_call_for_each_copy(pretended_gpu):
    clock, device = pretended_gpu, torch.device("cuda")
    assert [copies_beyond_cache(size, device) for size in (50 << 20, 200 << 20, 16)] == [4, 1, 256]
    found = interleaved(
        {"a": clock.call("a", 0.0)}, device, copies=4, budget_s=0.04, min_rounds=3, max_rounds=8
    )
    assert clock.log == [("a", copy) for _ in range(3) for copy in range(4)]  # 2 turns, 1 capture
    assert found["a"].median_ms == pytest.approx(1.0)
    assert found["a"][3:] == (8, 4, 2 * 4 + 2 * 4)
    assert clock.replays == 2 + 8


def test_launches_are_timed_from_the_host(pretended_gpu):
    calls = {"a": pretended_gpu.call("a", 2e-5)}
    found = interleaved(calls, torch.device("cuda"), method="stream", budget_s=0.01)
    assert found["a"].median_ms == pytest.approx(0.02)
    assert found["a"].calls >= 25
    assert pretended_gpu.replays == 0


# Memory


def test_kept_bytes_count_each_storage_once():
    x, y = torch.randn(10, 20, requires_grad=True), torch.randn(10, 20)
    assert timing.kept_bytes(lambda: x * x) == 800
    assert timing.kept_bytes(lambda: (x * y, x * 3.0)) == 800


def test_peak_bytes_of_a_chain_of_temporaries(capfd):
    x = torch.randn(1000)
    assert timing.peak_bytes(lambda: x.clone().clone().clone(), CPU) == 8000
    assert timing.peak_bytes(lambda: [x.clone(), x.clone(), x.clone()], CPU) == 12000
    assert timing.peak_bytes(lambda: None, CPU) == 0
    assert capfd.readouterr().err == ""
