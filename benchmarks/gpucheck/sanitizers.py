"""Stage: a small program under compute-sanitizer's four tools.

What a run on the CPU cannot see: the order of memory accesses between threads that really run at
the same time. Where the program is missing, or the platform does not let it look at the device,
that is recorded as "unavailable" and is no success.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpucheck.environment import find_nvcc, said_by
from gpucheck.rig import Rig
from gpucheck.sanitized import FINISHED
from gpucheck.stage import ROOT, Failure, Section, main

__all__ = ["TOOLS", "command", "judge"]

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
_SUMMARY = re.compile(
    r"(?:ERROR SUMMARY: (\d+) errors?"
    r"|RACECHECK SUMMARY: \d+ hazards? displayed \((\d+) errors?, (\d+) warnings?\))"
)
# How it says that it cannot watch here, in words that no finding has.
_REFUSALS = (
    "Device not supported", "Unable to find injection library", "not supported on this",
    "Failed to initialize", "No compatible", "insufficient driver", "could not be attached",
    "Target application terminated before first instrumented API call",
    "No attachable process", "permission", "Timed out",
)  # fmt: skip
_SAID = 1500


def find_sanitizer() -> str | None:
    """On PATH, or beside the compiler."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    nvcc = find_nvcc()
    beside = Path(nvcc).resolve().parent / "compute-sanitizer" if nvcc else None
    return str(beside) if beside is not None and os.access(beside, os.X_OK) else None


def command(sanitizer: str, tool: str, dry: bool) -> list[str]:
    """Watches this project's kernels alone; torch's own would take minutes, and have findings."""
    return [
        sanitizer, "--tool", tool, "--kernel-name", "kns=normnorm", "--print-limit", "20",
        "--report-api-errors", "no", "--error-exitcode", "86", "--target-processes",
        "application-only", *program(dry),
    ]  # fmt: skip


def program(dry: bool) -> list[str]:
    return [sys.executable, "-m", "gpucheck.sanitized", *(["--dry"] if dry else [])]


def judge(code: int | None, said: str) -> tuple[str, int | None, str]:
    """(status, findings, what it said) of one tool's run; ``code`` is None where it was killed."""
    summary = _SUMMARY.search(said)
    excerpt = _excerpt(said)
    if summary:
        findings = sum(int(number) for number in summary.groups() if number)
        finished = FINISHED in said and code == 0
        if findings or not finished:
            more = "" if findings else "no finding, but the program did not come to its end: "
            return "failed", findings, more + excerpt
        return "passed", 0, summary.group(0)
    if code is None:
        return "unavailable", None, f"its time was over: {excerpt}"
    refusal = next((line for line in said.splitlines() if _refuses(line)), None)
    if refusal is not None:
        return "unavailable", None, refusal.strip("= ")[:_SAID]
    return "failed", None, f"ended with exit status {code} and no summary: {excerpt}"


def _refuses(line: str) -> bool:
    return line.startswith("====") and any(w.lower() in line.lower() for w in _REFUSALS)


def _excerpt(said: str) -> str:
    """The tool's own words, the first ones."""
    words = [line for line in said.splitlines() if line.startswith("====")] or said.splitlines()
    return " / ".join(line.strip("= ") for line in words if line.strip("= "))[:_SAID]


def _watch(sanitizer: str, tool: str, section: Section) -> dict[str, Any]:
    began = time.time()
    # One allocation a tensor, so that an access past its end is one past the allocation's.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code: int | None = None
    try:
        done = subprocess.run(
            command(sanitizer, tool, section.dry), cwd=ROOT, env=environment, text=True,
            errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=max(1.0, section.left_s - 2),
        )  # fmt: skip
        code, said = done.returncode, done.stdout
    except subprocess.TimeoutExpired as late:
        said = late.stdout.decode(errors="replace") if isinstance(late.stdout, bytes) else ""
    except OSError as error:
        said = f"==== could not be attached: {error}"
    status, findings, words = judge(code, said)
    return {
        "status": status, "seconds": round(time.time() - began, 1), "errors": findings,
        "said": words,
    }  # fmt: skip


def _plain(section: Section) -> dict[str, Any]:
    """The same program unwatched: what fails there is not the sanitizer's finding."""
    began = time.time()
    try:
        done = subprocess.run(
            program(section.dry), cwd=ROOT, text=True, errors="replace", stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, timeout=max(1.0, section.left_s - 2),
        )  # fmt: skip
        passed, said = done.returncode == 0 and FINISHED in done.stdout, done.stdout
    except subprocess.TimeoutExpired:
        passed, said = False, "it did not come to its end in time"
    return {
        "passed": passed, "seconds": round(time.time() - began, 1), "said": said.strip()[-_SAID:],
    }  # fmt: skip


def _unavailable(why: str) -> dict[str, Any]:
    return {"status": "unavailable", "seconds": 0.0, "errors": None, "said": why}


def run(section: Section) -> None:
    Rig.find(section.dry)
    sanitizer = None if section.dry else find_sanitizer()
    section.data = {"program": sanitizer, "version": None, "tools": {}}
    tools = section.data["tools"]
    with ThreadPoolExecutor(len(TOOLS) + 1) as pool:  # each waits for a process
        plain = pool.submit(_plain, section)
        if sanitizer is None:
            why = "this is a dry run" if section.dry else "compute-sanitizer is not installed"
            tools.update({tool: _unavailable(why) for tool in TOOLS})
        else:
            version = said_by(sanitizer, "--version") or ""
            section.data["version"] = next(reversed(version.splitlines()), None)
            watched = {tool: pool.submit(_watch, sanitizer, tool, section) for tool in TOOLS}
            for tool, result in watched.items():
                tools[tool] = result.result()
                said = tools[tool]["said"]
                print(f"{tool}: {tools[tool]['status']} in {tools[tool]['seconds']} s: {said}")
        section.data["plain_run"] = plain.result()
    if not section.data["plain_run"]["passed"]:
        said = section.data["plain_run"]["said"].splitlines() or ["it said nothing"]
        raise Failure(f"the program to be watched fails by itself: {said[-1]}")
    states = {name: tool["status"] for name, tool in tools.items()}
    failed = [name for name, status in states.items() if status == "failed"]
    missing = [name for name, status in states.items() if status == "unavailable"]
    if failed:
        raise Failure("; ".join(f"{name}: {tools[name]['said']}" for name in failed)[:2000])
    if missing:
        section.finish("unavailable", f"{', '.join(missing)}: {tools[missing[0]]['said']}"[:500])


if __name__ == "__main__":
    main(run)
