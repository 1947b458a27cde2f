"""Cases that every rank of a process group runs at once.

The ranks of each size are spawned once, and run the selected cases for so many ranks in the same
order.
What a case finds wrong it raises after its last message, so that no rank waits for another.
"""

import os
import traceback
from collections.abc import Callable
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from filelock import FileLock

# name -> (ranks, function of (rank, ranks))
CASES: dict[str, tuple[int, Callable[[int, int], None]]] = {}
EXACT = {"rtol": 1e-10, "atol": 1e-10}
SEED = 11


def case(ranks):
    """Registers a function of (rank, ranks)."""

    def register(function):
        CASES[function.__name__] = ranks, function
        return function

    return register


def names(module):
    return [name for name, (_, function) in CASES.items() if function.__module__ == module]


def _run(rank, ranks, folder, selected):
    """A spawned process: selected cases for so many ranks, and what came of each in ``folder``."""
    import dtensor_cases  # noqa: F401
    import sync_cases  # noqa: F401

    if os.environ.get("NORMNORM_HOST_RUN") == "1":
        from host_cuda import torch_library

        torch_library.register()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=300),
    )  # fmt: skip
    found: dict[str, str | None] = {}
    for name, (wanted, function) in CASES.items():
        if wanted != ranks or name not in selected:
            continue
        torch.manual_seed(SEED)
        torch._dynamo.reset()
        try:
            function(rank, ranks)
            found[name] = None
        except (Exception, pytest.fail.Exception):
            found[name] = traceback.format_exc()
        torch.save(found, f"{folder}/{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


def check(name, request):
    """Fails with the tracebacks of the ranks on which the case failed."""
    ranks, _ = CASES[name]
    tmp_path_factory = request.getfixturevalue("tmp_path_factory")
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # a folder within that of the whole test run
        shared = shared.parent
    folder = shared / f"{ranks}_ranks"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            parameters = (getattr(item, "callspec", None) for item in request.session.items)
            selected = {each.params.get("name") for each in parameters if each}
            torch.multiprocessing.spawn(_run, (ranks, str(folder), selected), nprocs=ranks)
    found = [torch.load(folder / f"{rank}.pt").get(name, "not reached") for rank in range(ranks)]
    failed = [f"rank {rank}: {text}" for rank, text in enumerate(found) if text is not None]
    assert not failed, "\n".join(failed)
