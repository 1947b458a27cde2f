"""Layers over the shards of a DTensor equal one process, forward and backward, eager and compiled.

Two processes are spawned once and run every case of dtensor_cases.py.
"""

from __future__ import annotations

import dtensor_cases
import pytest
import torch
import torch.multiprocessing
from filelock import FileLock


@pytest.fixture
def outcomes(tmp_path_factory, request):
    """What each case gave on each rank, also where several test processes share the tests."""
    shared = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # each test process has a folder within the run's
        shared = shared.parent
    folder = shared / "dtensor_cases"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            torch.multiprocessing.spawn(
                dtensor_cases.run, (str(folder),), nprocs=dtensor_cases.RANKS
            )
    return [torch.load(folder / f"{rank}.pt") for rank in range(dtensor_cases.RANKS)]


@pytest.mark.parametrize("name", dtensor_cases.CASES)
def test_two_ranks(name, outcomes):
    failed = [found.get(name, "not reached") for found in outcomes]
    assert failed == [None] * len(failed), "\n".join(map(str, failed))
