"""A pytest plugin that writes down each test as it begins and ends, for a watcher outside.

Events go, a JSON object a line, into the file named by ``NORMNORM_GPU_CHECK_EVENTS``; tests named
in the file ``NORMNORM_GPU_CHECK_DONE``, a node id a line, are left out, and so are those that are
not of the share ``NORMNORM_GPU_CHECK_SHARE`` ("cuda 1/1": the backend, and which part of its
tests). After a failed test the device is asked whether it still serves; where it does not, the
process ends, since every later test of it would fail as well.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from gpucheck.stage import die_with_parent

EVENTS = "NORMNORM_GPU_CHECK_EVENTS"
DONE = "NORMNORM_GPU_CHECK_DONE"
SHARE = "NORMNORM_GPU_CHECK_SHARE"
# Exit status of a process whose device serves no longer.
BROKEN = 70
_MESSAGE = 1500


def _backend(item: pytest.Item) -> str:
    """Whose test it is; one that is nobody's goes with the CUDA kernels'."""
    callspec = getattr(item, "callspec", None)
    return str(callspec.params.get("backend", "cuda")) if callspec is not None else "cuda"


def share_of(items: list[pytest.Item], share: str) -> list[pytest.Item]:
    """The tests of a share, neighbours together: they need the same compiled kernels."""
    backend, _, part = share.partition(" ")
    number, _, of = part.partition("/")
    mine = [item for item in items if _backend(item) == backend]
    each = -(-len(mine) // int(of))
    return mine[(int(number) - 1) * each : int(number) * each]


class Reporter:
    """Writes the events; remembers how the test at work stands."""

    def __init__(self, path: Path, done: frozenset[str], share: str | None) -> None:
        self._path = path
        self._done = done
        self._share = share
        self._outcome: dict[str, tuple[str, str | None]] = {}
        self._began: dict[str, float] = {}

    def _emit(self, **event: Any) -> None:
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        mine = items if self._share is None else share_of(items, self._share)
        self._emit(event="collected", tests=[item.nodeid for item in mine])
        kept = [item for item in mine if item.nodeid not in self._done]
        chosen = {item.nodeid for item in kept}
        left_out = [item for item in items if item.nodeid not in chosen]
        if left_out:
            config.hook.pytest_deselected(items=left_out)
            items[:] = kept

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._began[nodeid] = time.time()
        self._outcome[nodeid] = ("passed", None)
        self._emit(event="begin", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        before, _ = self._outcome[report.nodeid]
        if report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self._outcome[report.nodeid] = ("skipped", str(reason)[:_MESSAGE])
        elif report.failed and before != "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            text = crash.message if crash is not None else report.longreprtext
            words = "" if report.when == "call" else f"in {report.when}: "
            self._outcome[report.nodeid] = ("failed", (words + text)[:_MESSAGE])

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        outcome, message = self._outcome.pop(nodeid)
        seconds = round(time.time() - self._began.pop(nodeid), 3)
        self._emit(event="end", test=nodeid, outcome=outcome, seconds=seconds, message=message)
        if outcome == "failed" and not _device_serves():
            self._emit(event="broken", test=nodeid)
            os._exit(BROKEN)


def _device_serves() -> bool:
    import torch

    if not torch.cuda.is_available():
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get(EVENTS)
    if path:
        die_with_parent()
        done = Path(os.environ[DONE]).read_text(encoding="utf-8").splitlines()
        share = os.environ.get(SHARE)
        config.pluginmanager.register(Reporter(Path(path), frozenset(done), share))
