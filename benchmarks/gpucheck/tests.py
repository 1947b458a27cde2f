"""Stage: ``tests/gpu`` under pytest, each test within its own time.

A kernel that waits for ever, at a barrier that some block never reaches, takes its whole process
along: the test at work is then recorded as failed, its process killed, and a new one does the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gpucheck import plugin
from gpucheck.rig import Rig
from gpucheck.stage import ROOT, Failure, Section, main

__all__ = ["Findings", "Watcher", "run", "shares"]

LIMIT_S = 60.0  # of one test
START_S = 90.0  # of what comes before the first and after the last
MOST_RESTARTS = 12
_TRITON_SHARES = 5
_FOLDER = ROOT / "tests/gpu"
# What would make the rest pointless stands first.
_FIRST = (
    "test_device", "test_parity", "test_rungs", "test_repeat", "test_graphs", "test_streams",
    "test_launches",
)  # fmt: skip


def _files(folder: Path) -> list[str]:
    found = {path.stem: str(path) for path in sorted(folder.glob("test_*.py"))}
    first = [found.pop(name) for name in _FIRST if name in found]
    return first + list(found.values())


@dataclass
class Watcher:
    """Runs pytest as often as it takes, and keeps what it reports.

    Attributes:
        files: what pytest is given.
        until: when it has to be over.
        limit_s: seconds that one test may take.
        save: called whenever there is something new.
        share: which of the tests are meant, as the plugin's :func:`plugin.share_of` takes it; None
            for all.
    """

    files: list[str]
    until: float
    limit_s: float
    save: Callable[[], None]
    share: str | None = None
    collected: list[str] = field(default_factory=list)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    restarts: int = 0
    _current: str | None = None
    _since: float = 0.0
    _rest: str = ""  # of a line that was not written to its end yet

    @property
    def not_run(self) -> list[str]:
        return [test for test in self.collected if test not in self.results]

    def run(self) -> None:
        """All tests, or as many as there is time for.

        Raises:
            Failure: pytest came to its end before there was a test.
        """
        while True:
            with tempfile.TemporaryDirectory() as folder:
                code, said = self._once(Path(folder))
            if not self.collected:
                tail = " / ".join(said.strip().splitlines()[-6:])
                raise Failure(f"pytest collected no test (exit status {code}): {tail[-1500:]}")
            if code in (2, 3, 4):  # interrupted, internal error, wrong usage
                tail = " / ".join(said.strip().splitlines()[-4:])
                raise Failure(f"pytest gave up with exit status {code}: {tail[-1500:]}")
            if code in (0, 1, 5) or not self.not_run or time.time() > self.until:
                return
            if self.restarts >= MOST_RESTARTS:
                raise Failure(f"after {self.restarts} restarts the rest of the tests is left")
            self.restarts += 1

    def _once(self, folder: Path) -> tuple[int | None, str]:
        """One process of pytest: its exit status (None where it did not come to an end of its own)
        and its output."""
        events, done, output = folder / "events", folder / "done", folder / "output"
        events.touch()
        done.write_text("\n".join(self.results), encoding="utf-8")
        command = [
            sys.executable, "-m", "pytest", "-p", "gpucheck.plugin", "-q", "--no-header",
            "--confcutdir", str(Path(self.files[0]).parent), "-p", "no:cacheprovider", *self.files,
        ]  # fmt: skip
        environment = {**os.environ, plugin.EVENTS: str(events), plugin.DONE: str(done)}
        if self.share is not None:
            environment[plugin.SHARE] = self.share
        self._current, self._since, self._rest = None, time.time(), ""
        code: int | None = None
        with output.open("w", encoding="utf-8") as file, events.open(encoding="utf-8") as news:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
            )
            while True:
                code = process.poll()
                self._take(news)
                if code is not None:
                    break
                limit = START_S if self._current is None else self.limit_s
                late = time.time() - self._since > limit
                if late or time.time() > self.until:
                    _kill(process)
                    self._take(news)
                    self._lost(
                        f"killed: it had not ended after {time.time() - self._since:.0f} s"
                        if late
                        else "killed: the time of all tests was over"
                    )
                    break
                time.sleep(0.05)
        said = output.read_text(encoding="utf-8", errors="replace")
        if code is not None and self._current is not None:
            how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
            self._lost(f"its process ended in the middle of it {how}")
            code = None
        self.save()
        return code, said

    def _take(self, news: Any) -> None:
        """Reads what the plugin has written since."""
        *lines, self._rest = (self._rest + news.read()).split("\n")
        for line in lines:
            event = json.loads(line)
            if event["event"] == "collected":
                self.collected = self.collected or event["tests"]
                self._since = time.time()
            elif event["event"] == "begin":
                self._current, self._since = event["test"], time.time()
            elif event["event"] == "end":
                self._keep(event["test"], event["outcome"], event["seconds"], event["message"])
            else:
                print(f"after {event['test']} the device served no longer; a new process goes on")

    def _keep(self, test: str, outcome: str, seconds: float, message: str | None) -> None:
        self.results[test] = {
            "test": _short(test), "outcome": outcome, "seconds": seconds, "message": message,
        }  # fmt: skip
        self._current, self._since = None, time.time()
        if outcome == "failed":
            print(f"FAILED {_short(test)}: {(message or '').splitlines()[0:1]}", flush=True)
        self.save()

    def _lost(self, message: str) -> None:
        """The test at work when its process ended before it."""
        if self._current is not None:
            self._keep(self._current, "failed", round(time.time() - self._since, 1), message)


def _short(test: str) -> str:
    return test.replace("tests/gpu/", "", 1)


def _kill(process: subprocess.Popen) -> None:
    process.kill()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def shares(rig: Rig) -> list[str]:
    """The tests in parts that run at the same time: Triton compiles its kernels as it meets them,
    which takes several processors some minutes, and the CUDA kernels' tests do not wait for it."""
    triton = (f"triton {n}/{_TRITON_SHARES}" for n in range(1, _TRITON_SHARES + 1))
    return ["cuda 1/1", *(triton if "triton" in rig.serving() else ())]


class Findings:
    """What all watchers have found, saved at most twice a second."""

    def __init__(self, section: Section) -> None:
        self._section = section
        self._lock = threading.Lock()
        self._saved = 0.0
        self.watchers: list[Watcher] = []

    @property
    def results(self) -> list[dict[str, Any]]:
        return [result for watcher in self.watchers for result in list(watcher.results.values())]

    @property
    def not_run(self) -> list[str]:
        return [_short(test) for watcher in self.watchers for test in watcher.not_run]

    def save(self, at_once: bool = False) -> None:
        with self._lock:
            if not at_once and time.time() - self._saved < 0.5:
                return
            self._saved = time.time()
            self._section.data = {
                "limit_a_test_s": LIMIT_S,
                "counts": dict(Counter(result["outcome"] for result in self.results)),
                "restarts": sum(watcher.restarts for watcher in self.watchers),
                "tests": self.results,
                "not_run": self.not_run,
            }
            self._section.save()


def run(section: Section) -> None:
    rig = Rig.find(section.dry)
    findings = Findings(section)
    findings.watchers = [
        Watcher(_files(_FOLDER), section.until - 4, LIMIT_S, findings.save, share)
        for share in shares(rig)
    ]
    try:
        with ThreadPoolExecutor(len(findings.watchers)) as pool:
            ends = [pool.submit(watcher.run) for watcher in findings.watchers]
    finally:
        findings.save(at_once=True)
    for end in ends:
        end.result()  # raises what the watcher did
    counts, results = section.data["counts"], findings.results
    words = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    restarts = section.data["restarts"]
    print(f"tests: {words}; {len(findings.not_run)} not run; {restarts} restarts")
    failed = [r for r in results if r["outcome"] == "failed"]
    if failed or findings.not_run:
        first = f"; first {failed[0]['test']}: {failed[0]['message']}" if failed else ""
        raise Failure(f"{len(failed)} failed, {len(findings.not_run)} not run{first}"[:2000])
    if not counts.get("passed"):
        raise Failure("no test ran to its end: all were skipped")


if __name__ == "__main__":
    main(run)
