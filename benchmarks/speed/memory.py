"""How much memory a call takes: what autograd keeps of it, and the most it has at a time."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["kept_bytes", "peak_bytes"]


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
    """Without what the profiler's library writes past Python to the process's standard error."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
