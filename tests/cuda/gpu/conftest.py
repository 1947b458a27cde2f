"""The rig that the tests run on, its backends, and a record of each test.

Without a GPU only ``test_device.py`` is collected, unless ``rig.VARIABLE`` selects the CPU. Where
``NORMNORM_GPU_CHECK_LINES`` names a file, each test appends JSON lines to it when it is planned,
begins and ends, and tests that the file says have begun are left out. So the record survives a
process that dies, and the next process continues after the test that killed it.
"""

import contextlib
import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from .rig import BACKENDS, Rig, mode

MODE = mode()
DRY = MODE == "dry"
HAS_RIG = MODE != "gpu" or torch.cuda.is_available()
collect_ignore_glob = [] if HAS_RIG else ["test_[!d]*.py"]
LINES = os.environ.get("NORMNORM_GPU_CHECK_LINES")
SHARE = os.environ.get("NORMNORM_GPU_CHECK_SHARE", "1/1")  # "2/5": the second of every five tests
# Triton's kernels take a second each to compile, and tests/triton interprets every variant of them:
# here a case per behaviour. By test, the ids that are kept; a test that is not named keeps all.
TRITON = {
    "test_training": "(.*-float32|batch-2d(-last)?-bfloat16|layer-float(16|64))-noise",
    "test_evaluation": "batch-2d-float32|batch-2d-last-bfloat16",
    "test_row_lengths": "float32-(1|37|760|5000)", "test_absent_parameters": ".*'weight', 'bias'.*",
    "test_automatic_tiers": "(row-|channel-|channel-.*-)(warp|streaming|last)-float32",
    "test_results_repeat_bitwise": r"(batch-2d|layer-long|group)-.*\.float32",
    "test_rounds": "batch-2d(-last)?-float32", "test_rounds_repeat_bitwise": "columns-float32",
    "test_channels_beyond_2_to_the_31": "last",
    "test_gradients_agree_with_finite_differences": "none: doctor has them",
    "test_a_batch_layers_training_step_is_four_kernels": "none: these launch more",
    "test_a_layers_evaluation_is_at_most_two_kernels": "none: these launch more",
}  # fmt: skip


@pytest.fixture(scope="session")
def rig() -> Rig:
    return Rig.find()


@pytest.fixture(autouse=True)
def _fresh(request: pytest.FixtureRequest) -> Iterator[None]:
    """Seeds each test, and waits for its work, so that errors are reported for this test."""
    torch.manual_seed(20250705)
    yield
    if "rig" in request.fixturenames:
        rig = request.getfixturevalue("rig")
        rig.synchronize()
        rig.free_cache()


def _under_test() -> list[str]:
    """The CUDA kernels, even if they cannot run, and the other backends of this rig."""
    if not HAS_RIG:
        return []
    if MODE == "compile":
        return ["triton"]
    serving = Rig.find().serving()
    return ["cuda", *(name for name in BACKENDS if name != "cuda" and name in serving)]


@pytest.fixture(params=_under_test())
def backend(request: pytest.FixtureRequest, rig: Rig) -> Iterator[str]:
    """Each backend that serves a GPU's tensors, chosen during the test."""
    from normnorm import use_backend

    reason = rig.reasons()[request.param]
    if reason is not None:
        pytest.fail(f"backend '{request.param}' cannot run: {reason}")
    with use_backend(request.param):
        yield request.param


def _kept(item: pytest.Item) -> bool:
    name, found, case = item.name.rstrip("]").partition("[triton")
    return not found or re.fullmatch(TRITON.get(name, ".*"), case.lstrip("-")) is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    number, of = map(int, SHARE.split("/"))
    items[:] = [item for item in items if _kept(item)][number - 1 :: of]
    if LINES:
        path = Path(LINES)
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        known: dict[str, str] = {}
        for line in lines:
            with contextlib.suppress(ValueError):  # cut off by a kill
                known[json.loads(line)["test"]] = json.loads(line)["outcome"]
        items[:] = [item for item in items if known.get(item.nodeid, "planned") == "planned"]
        for item in items:
            if item.nodeid not in known:
                _write(test=item.nodeid, outcome="planned")


def _write(**line: Any) -> None:
    with open(LINES or os.devnull, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


_began: dict[str, float] = {}
_outcome: dict[str, tuple[str, str]] = {}


def pytest_runtest_logstart(nodeid: str) -> None:
    _began[nodeid] = time.time()
    _outcome[nodeid] = ("passed", "")
    _write(test=nodeid, outcome="begun")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
        _outcome[report.nodeid] = ("skipped", str(reason))
    elif report.failed:
        _, before = _outcome[report.nodeid]
        _outcome[report.nodeid] = ("failed", f"{before}{report.longreprtext}\n")
        if LINES and torch.cuda.is_available() and not Rig.find().serves():
            pytest_runtest_logfinish(report.nodeid)
            os._exit(70)  # every later test of this process would fail as well


def pytest_runtest_logfinish(nodeid: str) -> None:
    outcome, said = _outcome.pop(nodeid)
    seconds = round(time.time() - _began.pop(nodeid), 3)
    _write(test=nodeid, outcome=outcome, seconds=seconds, said=said)
