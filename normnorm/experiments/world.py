"""One process, or one of several that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from normnorm.commands import usable_device

__all__ = ["World", "joined"]


@dataclass(frozen=True)
class World:
    """Where this process stands among those that train together."""

    rank: int
    size: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0

    def total(self, *numbers: float) -> list[float]:
        """Each number's sum over the processes."""
        if self.size == 1:
            return list(numbers)
        together = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        dist.all_reduce(together)
        return together.tolist()


@contextmanager
def joined(device: str | None) -> Iterator[World]:
    """The world that torchrun's environment describes, or this process alone.

    Args:
        device: "cpu", "cuda", "cuda:1", ...; None for a GPU where there is one. Under torchrun a
            process takes the GPU of its local rank.

    Raises:
        CommandError: the device cannot be used.
    """
    if "WORLD_SIZE" not in os.environ:
        yield World(0, 1, usable_device(device))
        return
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda"):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    found = usable_device(device)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    dist.init_process_group("nccl" if found.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), dist.get_world_size(), found)
    finally:
        dist.destroy_process_group()
