"""Runs the stages one after the other, each as a child process that may hang or die alone.

A kernel that never ends cannot be interrupted from within its process, and one that fails leaves
every later call of that process failing: hence a process a stage, killed with all it started when
its time is over. This process never touches the GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpucheck.record import Record
from gpucheck.stage import COMMAND, ROOT

__all__ = ["STAGES", "Stage", "child_environment", "run_stages", "why_not_begin"]

HERE = Path(__file__).resolve().parent
# Seconds between the end that a stage is told and the one that it is given.
GRACE_S = 6.0


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        name: its key in the record.
        ends_s: when it has to be over, in seconds from the start of the whole run: what an earlier
            stage leaves unused belongs to those after it.
        package: where the module of that name lies.
    """

    name: str
    ends_s: float
    package: str = "gpucheck"


STAGES = (
    Stage("environment", 60),  # the first import of torch may read gigabytes from a cold disk
    Stage("build", 240),
    Stage("smoke", 280),
    Stage("tests", 375),
    Stage("benchmark", 465),
    Stage("sanitizers", 530),
)


def child_environment(dry: bool) -> dict[str, str]:
    """What a stage finds in its environment: the sources on its path, and who asked for what."""
    path = os.pathsep.join([str(ROOT), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    return {
        **os.environ,
        "PYTHONPATH": path.rstrip(os.pathsep),
        "PYTHONUNBUFFERED": "1",
        "NORMNORM_GPU_CHECK": "dry" if dry else "gpu",
        COMMAND: shlex.join([sys.executable, *sys.argv]),
    }


def why_not_begin(seconds: float = 180) -> str | None:
    """Why nothing can be checked here, asked before anything that is stored is overwritten."""
    program = "import sys; from gpucheck.rig import why_no_gpu; sys.exit(why_no_gpu())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=ROOT, env=child_environment(False), text=True,
            capture_output=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"torch did not say within {seconds:.0f} s whether there is a GPU"
    lines = done.stderr.strip().splitlines() or ["torch could not be asked for a GPU"]
    return lines[-1] if done.returncode else None


def _kill(process: subprocess.Popen) -> None:
    """Ends a child with everything in its process group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)


def _pump(process: subprocess.Popen, log: Path) -> None:
    """Passes on what a child says as it says it, and keeps it."""
    assert process.stdout is not None
    for line in process.stdout:
        sys.stdout.write(line)
        sys.stdout.flush()
        with contextlib.suppress(OSError), log.open("a", encoding="utf-8") as file:
            file.write(line)


def _read(partial: Path) -> dict[str, Any]:
    """What a stage has left of itself."""
    try:
        left = json.loads(partial.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {"status": None, "message": None, "data": None}
    return {key: left.get(key) for key in ("status", "message", "data")}


def run_stage(stage: Stage, record: Record, until: float, dry: bool) -> dict[str, Any]:
    """A stage from its start to its end, or its kill: its section of the record."""
    began = time.time()
    with contextlib.suppress(OSError):
        record.partial.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        f"{stage.package}.{stage.name}",
        "--section",
        str(record.partial),
    ]
    command += ["--until", str(until), *(["--dry"] if dry else [])]
    process = subprocess.Popen(
        command, cwd=ROOT, env=child_environment(dry), stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip
    pump = threading.Thread(target=_pump, args=(process, record.log), daemon=True)
    pump.start()
    cut = ""
    try:
        process.wait(max(1.0, until + GRACE_S - time.time()))
    except subprocess.TimeoutExpired:
        cut = "killed after {:.0f} s, when its time was over"
    except KeyboardInterrupt:
        cut = "interrupted after {:.0f} s"
    finally:
        _kill(process)  # also what it left running
    pump.join(2)
    section = _read(record.partial)
    seconds = round(time.time() - began, 1)
    if cut:
        section["status"] = "failed"
        section["message"] = cut.format(seconds) + (
            "; what it had recorded is kept" if section["data"] else ""
        )
        section["interrupted"] = cut.startswith("interrupted")
    elif section["status"] is None:
        section["status"] = "failed"
        code = process.returncode
        how = f"by signal {signal.Signals(-code).name}" if code < 0 else f"with exit status {code}"
        section["message"] = f"ended {how} without a word on how it went; see {record.log.name}"
    return {**section, "seconds": seconds}


def run_stages(record: Record, dry: bool, stages: Sequence[Stage] = STAGES) -> None:
    """All stages; the record is on disk after each."""
    start = time.time()
    for number, stage in enumerate(stages, 1):
        try:
            print(f"\n== {number}/{len(stages)} {stage.name}", flush=True)
            section = run_stage(stage, record, start + stage.ends_s, dry)
        except KeyboardInterrupt:  # before it had begun, or after its end
            section = {
                "status": "failed", "message": "interrupted", "data": None, "seconds": 0.0,
                "interrupted": True,
            }  # fmt: skip
        interrupted = section.pop("interrupted", False)
        record.add(stage.name, section)
        said = record.stages[stage.name]
        words = f": {said['message']}" if said["message"] else ""
        print(f"-- {stage.name} {said['status']} in {said['seconds']:.1f} s{words}", flush=True)
        if interrupted:
            raise KeyboardInterrupt
    with contextlib.suppress(OSError):
        record.partial.unlink(missing_ok=True)
