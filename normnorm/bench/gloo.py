"""Messages between processes of this machine, and what alpha and beta predict of them.

:func:`check` starts processes that speak gloo and, in alternation, times collective operations of
a few sizes and the whole sequence of a network's training step. From the former it fits
``alpha + b beta``, for each kind of operation; the sum of that over the sequence is the
prediction, the latter the measurement. Nothing of the sequence enters the fit.

Both stand on medians: of every call of a size, over the sequence and the rounds. A machine that
does other work now and then lets a call wait for milliseconds; those calls are few, but they
would be most of a plain sum. The sum as the clock saw it is kept beside it.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from normnorm.bench.distributed_model import Message

__all__ = ["CALIBRATION", "CollectiveCheck", "check", "fit_alpha_beta"]

# Sizes whose times are fitted: numbers of a few channels, up to a bucket of gradients.
CALIBRATION = (
    *(Message("all_reduce", size) for size in (256, 2048, 16384, 131072, 4 << 20, 24 << 20)),
    *(Message("all_gather", size) for size in (256, 2048, 16384, 131072)),
)
_CALIBRATION_BYTES = 8 << 20  # a sample of a small size is many calls, one of a large size few
_MOST_CALLS = 24
_TIMEOUT = datetime.timedelta(seconds=60)


@dataclass(frozen=True, kw_only=True)
class CollectiveCheck:
    """One sequence of all-reduces, predicted and measured.

    Attributes:
        what: which sequence.
        processes: how many took part, all on this machine.
        backend: that of torch.distributed.
        alpha_us: fitted microseconds of an all-reduce of nothing.
        gb_per_s: fitted bytes of an all-reduced tensor a second, in 1e9.
        gather_alpha_us: fitted microseconds of an all-gather of nothing.
        calls, bytes: the sequence's messages and what a rank puts into all of them.
        predicted_ms: by the fit.
        measured_ms: the sum over the calls of the median time of calls of that size.
        wall_ms: the median over rounds of the whole sequence by the clock, disturbances included.
        rounds: how many.
    """

    what: str
    processes: int
    backend: str
    alpha_us: float
    gb_per_s: float
    gather_alpha_us: float
    calls: int
    bytes: int
    predicted_ms: float
    measured_ms: float
    wall_ms: float
    rounds: int

    @property
    def error(self) -> float:
        """The prediction's, relative to the measurement."""
        return self.predicted_ms / self.measured_ms - 1


def fit_alpha_beta(times: Mapping[int, float]) -> tuple[float, float]:
    """Seconds, and seconds a byte, that fit these times by size best, relative to each.

    Neither is negative.
    """
    import numpy as np
    from scipy.optimize import nnls

    sizes = np.array(list(times), dtype=float)
    seconds = np.array(list(times.values()))
    unit = sizes.max()  # so that both columns are of a size
    matrix = np.stack([1 / seconds, sizes / unit / seconds], axis=1)
    (alpha, beta), _ = nnls(matrix, np.ones_like(seconds))
    return float(alpha), float(beta / unit)


def _each_seconds(buffer: torch.Tensor, messages: Sequence[Message]) -> list[float]:
    """Seconds of every message of a sequence, one right after the other."""
    import torch.distributed as dist

    # One behind the other, as a model's gradients lie: what was just reduced is not reduced again.
    calls: list[Callable[[], object]] = []
    end = 0
    for kind, size in messages:
        start = end if end + size // 4 <= buffer.numel() else 0
        end = start + size // 4
        part = buffer[start:end]
        if kind == "all_gather":
            gathered = list(part.new_empty(dist.get_world_size(), part.numel()).unbind())
            calls.append(functools.partial(dist.all_gather, gathered, part))
        else:
            calls.append(functools.partial(dist.all_reduce, part))
    dist.barrier()
    clock = [time.perf_counter()]
    for call in calls:
        call()
        clock.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(clock)]


def _worker(
    rank: int, processes: int, folder: str, sequences: Sequence[Sequence[Message]], rounds: int
) -> None:
    """One process: measures with the others; the first of them keeps what came out."""
    import torch.distributed as dist

    if sys.platform == "linux":  # the machine itself, whatever its network
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=Path(folder, "rendezvous").as_uri(), rank=rank, world_size=processes,
        timeout=_TIMEOUT,
    )  # fmt: skip
    try:
        work = [*map(_calls, CALIBRATION), *sequences]
        buffer = torch.zeros(max(sum(size for _, size in messages) for messages in work) // 4)
        found: list[list[list[float]]] = [[] for _ in work]
        for turn in range(-1, rounds):  # one turn to warm up
            for times, messages in zip(found, work, strict=True):
                seconds = _each_seconds(buffer, messages)
                if turn >= 0:
                    times.append(seconds)
        if rank == 0:
            torch.save(found, Path(folder, "times.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _calls(message: Message) -> list[Message]:
    return [message] * max(2, min(_MOST_CALLS, _CALIBRATION_BYTES // message.bytes))


def _run(
    processes: int, sequences: Sequence[Sequence[Message]], rounds: int
) -> list[list[list[float]]]:
    """Seconds of every call of every round: of each calibration, then of each sequence."""
    from torch.multiprocessing.spawn import start_processes

    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _worker, (processes, folder, list(map(tuple, sequences)), rounds), nprocs=processes,
            start_method="forkserver",
        )  # fmt: skip
        found: list[list[list[float]]] = torch.load(Path(folder, "times.pt"))
    return found


def check(
    processes: int, sequences: Mapping[str, Sequence[Message]], rounds: int = 9
) -> list[CollectiveCheck]:
    """Predicts and measures sequences of messages between processes of this machine.

    Args:
        processes: how many, at least 2.
        sequences: messages by the sequence's name; their bytes are multiples of 4.
        rounds: how often everything is measured, in alternation.

    Raises:
        ValueError: fewer than two processes, or a size that is no multiple of 4.
        torch.multiprocessing.ProcessRaisedException: a process failed.
    """
    if processes < 2:
        raise ValueError(f"at least 2 processes are needed to reduce between, got {processes}")
    for name, messages in sequences.items():
        for _, size in messages:
            if size <= 0 or size % 4:
                raise ValueError(
                    f"sizes must be positive multiples of 4 bytes, got {size} in {name!r}"
                )
    calibration, times = _split(_run(processes, list(sequences.values()), rounds))
    fits = {
        kind: fit_alpha_beta({m.bytes: t for m, t in calibration.items() if m.kind == kind})
        for kind in ("all_reduce", "all_gather")
    }
    alpha, beta = fits["all_reduce"]
    return [
        CollectiveCheck(
            what=name,
            processes=processes,
            backend="gloo",
            alpha_us=alpha * 1e6,
            gb_per_s=1e-9 / beta if beta else 0.0,
            gather_alpha_us=fits["all_gather"][0] * 1e6,
            calls=len(messages),
            bytes=sum(size for _, size in messages),
            predicted_ms=1e3 * sum(fits[kind][0] + size * fits[kind][1] for kind, size in messages),
            measured_ms=1e3 * _sum_of_medians(messages, found),
            wall_ms=1e3 * statistics.median(map(sum, found)),
            rounds=rounds,
        )
        for (name, messages), found in zip(sequences.items(), times, strict=True)
    ]


def _split(
    times: list[list[list[float]]],
) -> tuple[dict[Message, float], list[list[list[float]]]]:
    """The median of each calibration's calls, and the sequences' times."""
    own, rest = times[: len(CALIBRATION)], times[len(CALIBRATION) :]
    medians = [statistics.median(itertools.chain(*rounds)) for rounds in own]
    return dict(zip(CALIBRATION, medians, strict=True)), rest


def _sum_of_medians(messages: Sequence[Message], rounds: Sequence[Sequence[float]]) -> float:
    """Over a sequence's messages, the median time of equal ones in all rounds."""
    alike: dict[Message, list[float]] = {message: [] for message in messages}
    for seconds in rounds:
        for message, each in zip(messages, seconds, strict=True):
            alike[message].append(each)
    return sum(statistics.median(alike[message]) for message in messages)
