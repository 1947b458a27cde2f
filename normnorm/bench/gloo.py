"""All-reduces between processes of this machine, and what alpha and beta predict of them.

:func:`check` starts processes that speak gloo and, in alternation, times all-reduces of a few
sizes and the whole sequence of a network's training step. From the former it fits
``alpha + b beta``; the sum of that over the sequence is the prediction, the latter the
measurement. Nothing of the sequence enters the fit.

Both stand on medians: of every call of a size, over the sequence and the rounds. A machine that
does other work now and then lets a call wait for milliseconds; those calls are few, but they
would be most of a plain sum. The sum as the clock saw it is kept beside it.
"""

from __future__ import annotations

import datetime
import itertools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

__all__ = ["CALIBRATION", "CollectiveCheck", "check", "fit_alpha_beta"]

# Sizes whose times are fitted: floats a channel of a few channels, up to a bucket of gradients.
CALIBRATION = (256, 2048, 16384, 131072, 4 << 20, 24 << 20)
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
        gb_per_s: fitted bytes of the tensor a second, in 1e9.
        calls, bytes: the sequence's all-reduces and their sum.
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


def _each_seconds(buffer: torch.Tensor, sizes: Sequence[int]) -> list[float]:
    """Seconds of every all-reduce of a sequence, one right after the other."""
    import torch.distributed as dist

    # One behind the other, as a model's gradients lie: what was just reduced is not reduced again.
    parts, end = [], 0
    for size in sizes:
        start = end if end + size // 4 <= buffer.numel() else 0
        end = start + size // 4
        parts.append(buffer[start:end])
    dist.barrier()
    clock = [time.perf_counter()]
    for part in parts:
        dist.all_reduce(part)
        clock.append(time.perf_counter())
    return [after - before for before, after in itertools.pairwise(clock)]


def _worker(
    rank: int, processes: int, folder: str, sequences: Mapping[str, Sequence[int]], rounds: int
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
        work = {**{str(size): _calls(size) for size in CALIBRATION}, **sequences}
        buffer = torch.zeros(max(sum(sizes) for sizes in work.values()) // 4)
        found: dict[str, list[list[float]]] = {name: [] for name in work}
        for turn in range(-1, rounds):  # one turn to warm up
            for name, sizes in work.items():
                seconds = _each_seconds(buffer, sizes)
                if turn >= 0:
                    found[name].append(seconds)
        if rank == 0:
            torch.save(found, Path(folder, "times.pt"))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _calls(size: int) -> list[int]:
    return [size] * max(2, min(_MOST_CALLS, _CALIBRATION_BYTES // size))


def _run(
    processes: int, sequences: Mapping[str, Sequence[int]], rounds: int
) -> dict[str, list[list[float]]]:
    """Seconds of every call of every round, by calibration size and by sequence."""
    from torch.multiprocessing.spawn import start_processes

    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _worker, (processes, folder, dict(sequences), rounds), nprocs=processes,
            start_method="forkserver",
        )  # fmt: skip
        found: dict[str, list[list[float]]] = torch.load(Path(folder, "times.pt"))
    return found


def check(
    processes: int, sequences: Mapping[str, Sequence[int]], rounds: int = 9
) -> list[CollectiveCheck]:
    """Predicts and measures sequences of all-reduces between processes of this machine.

    Args:
        processes: how many, at least 2.
        sequences: the bytes of each all-reduce, by the sequence's name; multiples of 4.
        rounds: how often everything is measured, in alternation.

    Raises:
        ValueError: fewer than two processes, or a size that is no multiple of 4.
        torch.multiprocessing.ProcessRaisedException: a process failed.
    """
    if processes < 2:
        raise ValueError(f"at least 2 processes are needed to reduce between, got {processes}")
    for name, sizes in sequences.items():
        for size in sizes:
            if size <= 0 or size % 4:
                raise ValueError(
                    f"sizes must be positive multiples of 4 bytes, got {size} in {name!r}"
                )
    times = _run(processes, sequences, rounds)
    alpha, beta = fit_alpha_beta(
        {size: statistics.median(itertools.chain(*times[str(size)])) for size in CALIBRATION}
    )
    return [
        CollectiveCheck(
            what=name,
            processes=processes,
            backend="gloo",
            alpha_us=alpha * 1e6,
            gb_per_s=1e-9 / beta if beta else float("inf"),
            calls=len(sizes),
            bytes=sum(sizes),
            predicted_ms=(len(sizes) * alpha + sum(sizes) * beta) * 1e3,
            measured_ms=_sum_of_medians(sizes, times[name]) * 1e3,
            wall_ms=statistics.median(map(sum, times[name])) * 1e3,
            rounds=rounds,
        )
        for name, sizes in sequences.items()
    ]


def _sum_of_medians(sizes: Sequence[int], rounds: Sequence[Sequence[float]]) -> float:
    """Over a sequence's calls, the median time of calls of the same size in all rounds."""
    by_size: dict[int, list[float]] = {size: [] for size in sizes}
    for seconds in rounds:
        for size, each in zip(sizes, seconds, strict=True):
            by_size[size].append(each)
    return sum(statistics.median(by_size[size]) for size in sizes)
