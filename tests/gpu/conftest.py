"""The rig that the tests run on and the backends that serve there.

Without a GPU nothing but ``test_device.py`` is collected, whose one test says so;
``NORMNORM_GPU_CHECK=dry`` puts the CPU, and the CUDA kernels compiled for it, in the GPU's place.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from gpucheck.rig import BACKENDS, VARIABLE, Rig

DRY = os.environ.get(VARIABLE) == "dry"
HAS_RIG = DRY or torch.cuda.is_available()
collect_ignore_glob = [] if HAS_RIG else ["test_[!d]*.py"]


@pytest.fixture(scope="session")
def rig() -> Rig:
    return Rig.find()


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """The same random numbers for each test; what it left running is its own failure."""
    torch.manual_seed(20250705)
    yield
    if "rig" in request.fixturenames:
        rig = request.getfixturevalue("rig")
        rig.synchronize()
        rig.free_cache()


def _under_test() -> list[str]:
    """The CUDA kernels whether they can run or not, and what else serves here."""
    if not HAS_RIG:
        return []
    serving = Rig.find().serving()
    return ["cuda", *(name for name in BACKENDS if name != "cuda" and name in serving)]


@pytest.fixture(params=_under_test())
def backend(request: pytest.FixtureRequest, rig: Rig) -> Iterator[str]:
    """Each backend that serves a GPU's tensors, chosen for the length of the test."""
    reason = rig.reasons()[request.param]
    if reason is not None:
        pytest.fail(f"backend '{request.param}' cannot run: {reason}")
    with rig.backend(request.param):
        yield request.param
