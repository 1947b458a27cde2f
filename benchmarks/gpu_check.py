"""Builds normnorm for the GPU of this machine, checks it there and measures it.

    make gpu-check [MINUTES=8] [RESULTS=DIR]      python3 benchmarks/gpu_check.py --minutes 8
    make gpu-check DRY=1                          the same on a CPU, with tiny inputs

Each step is a child process with a time limit, and all of them together end within the minutes:
what was not reached is "not run" and no failure. After each step the results' folder holds what
is known by then. ``docs/measured/gpu.md`` says what each step does and how the results are read.
"""

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import gpu_summary

ROOT = Path(__file__).resolve().parents[1]
GPU = ROOT / "tests/cuda/gpu"
RESERVE_S = 6.0  # for what is written at the end
SILENT_S = 60.0  # a test process that has reported nothing for so long hangs
SILENT = "nothing had happened"
COMPILE_S = 90.0  # the Triton tests' kernels, before those tests
MOST_RESTARTS = 3
LOG_BYTES = 600_000  # of one child's output
LARGEST_BYTES = 15_000_000  # of one file
LOG = "gpu_check.log"
# What decides about everything comes first; tests that want the whole memory run alone.
FIRST = ("test_device", "test_parity", "test_tiers", "test_launches", "test_repeat")
ALONE = "test_large"
TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")


class Ended(NamedTuple):
    """How a child ended: its exit status, or None where it was killed; by what, and its output."""

    code: int | None
    killed: str | None
    seconds: float
    said: str


class Check:
    """One run: its deadline, its children (whose output lies in ``scratch`` until they have ended),
    the record of ``gpu_check.json``, and what is known of each test by its pytest id."""

    def __init__(self, scratch: Path, dry: bool, deadline: float) -> None:
        self.folder = self.scratch = scratch
        self.dry = dry
        # How many times as long as a machine with a GPU a step and a test may take.
        self.patience = 4.0 if dry else 1.0
        self.deadline = deadline
        self.began = time.monotonic()
        self.tests: dict[str, dict[str, Any]] = {}
        self.lock = threading.RLock()
        self.children: set[subprocess.Popen] = set()
        self.record: dict[str, Any] = {
            "format": "normnorm-gpu-check", "version": 2, "dry": dry, "started": now(),
            "finished": None, "command": [Path(sys.executable).name, *sys.argv], "machine": {},
            "steps": [],
        }  # fmt: skip

    def keep_in(self, folder: Path) -> None:
        """From here on results go into that folder; OSError where that is not possible."""
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("gpu_check*"):
            old.unlink()
        shutil.copy(self.folder / LOG, folder)
        self.folder = folder
        self.save()

    @property
    def left_s(self) -> float:
        return self.deadline - time.monotonic()

    def start(self, command: Sequence[str], output: Path, **variables: str) -> subprocess.Popen:
        folders = ("", "tests", "tests/core", "tests/cuda", "tests/triton")
        paths = [*(str(ROOT / folder) for folder in folders), os.environ.get("PYTHONPATH", "")]
        mine = {
            "PYTHONPATH": os.pathsep.join(paths).rstrip(os.pathsep), "PYTHONUNBUFFERED": "1",
        }  # fmt: skip
        if self.dry:
            mine["NORMNORM_GPU_CHECK"] = "dry"
        with output.open("wb") as file:
            child = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, **mine, **variables}, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        with self.lock:
            self.children.add(child)
        return child

    def kill(self, child: subprocess.Popen) -> None:
        """Ends a child with everything in its process group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(3)  # longer where the driver does not let go of it; the rest goes on
        with self.lock:
            self.children.discard(child)

    def child(
        self, name: str, command: Sequence[str], seconds: float, *, watched: Path | None = None,
        **variables: str,
    ) -> Ended:  # fmt: skip
        """Runs a program to its end, or kills it when its time or that of the check is over, or
        when a file that it appends to has not grown for too long. Its output goes into the log."""
        output = self.scratch / f"{name}.out"
        began = time.monotonic()
        try:
            child = self.start(command, output, **variables)
        except OSError as error:  # there is no such program
            return Ended(127, None, 0.0, str(error))
        seconds, silent = seconds * self.patience, SILENT_S * self.patience
        size = watched.stat().st_size if watched is not None and watched.exists() else 0
        killed, grew = None, began + seconds  # it may take its time until it begins
        while child.poll() is None and killed is None:
            now = time.monotonic()
            if watched is not None and watched.exists() and watched.stat().st_size != size:
                size, grew = watched.stat().st_size, now
            if now > self.deadline:
                killed = "the time of the whole check was over"
            elif now - began > seconds:
                killed = f"it had not ended within {seconds:.0f} s"
            elif now - grew > silent:
                killed = f"{SILENT} for {silent:.0f} s"
            else:
                time.sleep(0.05)
        code = child.poll()
        self.kill(child)  # also what it left running
        said = output.read_bytes()[-LOG_BYTES:].decode(errors="replace")
        output.unlink()
        took = round(time.monotonic() - began, 1)
        with self.lock, (self.folder / LOG).open("a", encoding="utf-8") as log:
            if log.tell() < LARGEST_BYTES - LOG_BYTES:
                log.write(f"\n== {name}: {' '.join(map(str, command))}\n{said}\n-- {took} s\n")
        return Ended(None if killed else code, killed, took, said)

    def note(self, name: str, status: str, seconds: float, message: str = "", **more: Any) -> None:
        """Adds a step to the record, which is on disk afterwards."""
        step = {"step": name, "status": status, "seconds": seconds, "message": message, **more}
        print(f"{status:8} {seconds:6.1f} s  {name}{': ' if message else ''}{message[:300]}",
              flush=True)  # fmt: skip
        with self.lock:
            self.record["steps"].append(step)
            self.save()

    def save(self) -> None:
        self.record["seconds"] = round(time.monotonic() - self.began, 1)
        self.record["tests"] = dict(Counter(t["outcome"] for t in self.tests.values()))
        self.record["failed"] = [s["step"] for s in self.record["steps"] if s["status"] == "failed"]
        write(self.folder / "gpu_check.json", json.dumps(self.record, indent=1) + "\n")
        most = LARGEST_BYTES // (1 + len(self.tests))
        tests = [{**test, "said": test["said"][:most]} for test in self.tests.values()]
        write(self.folder / "gpu_check_tests.json", json.dumps(tests, indent=1) + "\n")
        write(self.folder / "gpu_check.md", gpu_summary.markdown(self.record, self.folder))

    def step(
        self, name: str, command: Sequence[str], seconds: float, *, needs_s: float = 5.0,
        **variables: str,
    ) -> Ended | None:  # fmt: skip
        """A program as a step: failed where it exits with another status than 0, or hangs; not run
        where no time is left for it, or all time was over before it ended."""
        if self.left_s < needs_s:
            self.note(name, "not run", 0.0, "no time was left")
            return None
        ended = self.child(name, command, seconds, **variables)
        if ended.code == 0:
            self.note(name, "passed", ended.seconds, last_line(ended))
        elif ended.killed and self.left_s <= 0:
            self.note(name, "not run", ended.seconds, ended.killed)
        else:
            self.note(name, "failed", ended.seconds, ended.killed or last_line(ended))
        return ended


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def write(path: Path, text: str) -> None:
    """Replaces a file in one step: a kill leaves the old text or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def last_line(ended: Ended) -> str:
    lines = [line for line in ended.said.splitlines() if line.strip()]
    said = (lines or ["it said nothing"])[-1]
    return f"exit status {ended.code}: {said}" if ended.code else said


def stop(sentence: str) -> NoReturn:
    """Ends the run before anything was written."""
    print(f"gpu check: {sentence}", file=sys.stderr)
    raise SystemExit(2)


def machine(check: Check) -> dict[str, Any]:
    """What ``normnorm doctor`` says of machine and versions."""
    command = [sys.executable, "-m", "normnorm", "doctor", "--json", "--no-checks"]
    ended = check.child("machine", command, 90)
    try:
        text = ended.said[ended.said.index("{\n") :]
        found = json.JSONDecoder().raw_decode(text)[0]["environment"]
    except (ValueError, KeyError):
        stop(f"normnorm does not run here: {ended.killed or last_line(ended)}")
    if not found["gpu"] and not check.dry:
        stop(f"no GPU: torch {found['torch']} finds none; `make gpu-check DRY=1` runs without one")
    check.record["machine"] = found
    check.note("machine", "passed", ended.seconds, ", ".join(g["name"] for g in found["gpu"]))
    return found


def first_contact(check: Check) -> list[str]:
    """Each path of the CUDA kernels; a new process goes on where one hangs. The names of those
    that hang."""
    found: dict[str, str | None] = {}
    paths: list[str] = []
    hung, took, message = [], 0.0, ""
    while check.left_s > 5:
        command = [sys.executable, str(GPU / "first_contact.py"), *paths]
        ended = check.child("first contact", command, 45)
        took += ended.seconds
        begun = None
        for line in ended.said.splitlines():
            if line.startswith('{"paths"'):
                paths = json.loads(line)["paths"]
            elif line.startswith('{"path"'):
                said = json.loads(line)
                begun = said["path"] if "error" not in said else None
                if begun is None:
                    found[said["path"]] = said["error"]
        if begun is not None and check.left_s > 0:
            found[begun] = f"hangs: {ended.killed}" if ended.killed else last_line(ended)
        hung = [path for path, error in found.items() if str(error).startswith("hangs")]
        before, paths = paths, [path for path in paths if path not in found]
        if not paths or paths == before or ended.code in (0, 1):
            message = "" if ended.code in (0, 70) or found else last_line(ended)
            break
    wrong = [f"{path}: {error}" for path, error in found.items() if error]
    message = "; ".join([*filter(None, [message]), *wrong])
    status = "failed" if message else "passed" if found else "not run"
    check.note("first contact", status, round(took, 1), message, paths=found)
    return hung


def run_file(check: Check, file: Path, select: str, seconds: float) -> None:
    """A file of tests, in as many processes as it takes: one that hangs or dies is followed by
    another that goes on behind the test that it was at."""
    name = f"{file.name} ({select})"
    lines = check.scratch / f"{name}.jsonl"
    command = [
        sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider",
        "--confcutdir", str(file.parent), "-k", select, str(file),
    ]  # fmt: skip
    began, status, message, tests = time.monotonic(), "not run", "no time was left", {}
    for _ in range(1 + MOST_RESTARTS):
        if check.left_s < 5:
            break
        ended = check.child(
            name, command, seconds, watched=lines, NORMNORM_GPU_CHECK_LINES=str(lines)
        )
        tests = read_lines(lines)
        late = bool(ended.killed) and not ended.killed.startswith(SILENT)
        for test in tests.values():
            if test["outcome"] == "begun":
                why = ended.killed or f"its process ended in the middle of it: {last_line(ended)}"
                test.update(outcome="not run" if late else "failed", said=why)
                with lines.open("a", encoding="utf-8") as known:
                    known.write("\n" + json.dumps(test) + "\n")
        if late or ended.code in (0, 1, 5):
            status, message = ("not run", ended.killed) if late else ("passed", "")
            break
        status, message = "failed", ended.killed or last_line(ended)
        if not tests or ended.code in (2, 3, 4):  # pytest itself gave up
            break
    for test in tests.values():
        if test["outcome"] == "planned":
            test.update(outcome="not run", said="no time was left")
    counts = Counter(test["outcome"] for test in tests.values())
    said = [", ".join(f"{n} {outcome}" for outcome, n in sorted(counts.items())), message]
    if counts["failed"]:
        first = next(t for t in tests.values() if t["outcome"] == "failed")
        last = first["said"].strip().rpartition("\n")[2]
        status = "failed"
        said.insert(1, f"{first['test'].rpartition('::')[2]}: {last}")
    with check.lock:
        check.tests.update(tests)
    took = round(time.monotonic() - began, 1)
    check.note(name, status, took, "; ".join(filter(None, said)))


def read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """What a test process has written: the last line of each test."""
    tests: dict[str, dict[str, Any]] = {}
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # cut off by a kill
            found = json.loads(line)
            tests[found["test"]] = {"said": "", **found}
    return tests


def run_files(check: Check, select: str, seconds: float = 150.0) -> None:
    """All files of tests, several at a time."""
    files = {path.stem: path for path in sorted(GPU.glob("test_*.py"))}
    alone = files.pop(ALONE)
    order = [*(files.pop(name) for name in FIRST), *files.values()]
    with ThreadPoolExecutor(2 if check.dry else 4) as pool:
        list(pool.map(lambda file: run_file(check, file, select, seconds), order))
    run_file(check, alone, select, seconds)


def compile_triton(check: Check, capability: Sequence[int]) -> None:
    """Fills Triton's cache with the kernels of the Triton tests, which would be compiled one after
    the other where they are launched. A process for each processor; they see no GPU."""
    many = 1 if check.dry else len(os.sched_getaffinity(0))
    select = "triton and " + ("repeat and float32" if check.dry else "not large and not compile")
    command = [
        sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=line",
        "--confcutdir", str(GPU), "-k", select, str(GPU),
    ]  # fmt: skip
    began = time.monotonic()
    outputs = [check.scratch / f"compile-{i + 1}" for i in range(many)]
    children = [
        check.start(
            command, output, CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1",
            NORMNORM_GPU_CHECK=f"compile sm_{capability[0]}{capability[1]}",
            NORMNORM_GPU_CHECK_SHARE=f"{i + 1}/{many}",
        )
        for i, output in enumerate(outputs)
    ]  # fmt: skip
    until = began + min(COMPILE_S * check.patience, check.left_s / 2)
    while time.monotonic() < until and any(child.poll() is None for child in children):
        time.sleep(0.1)
    done = sum(child.poll() is not None for child in children)
    for child in children:
        check.kill(child)
    with (check.folder / LOG).open("a", encoding="utf-8") as log:
        for output in outputs:
            log.write(f"\n== {output.name}\n{output.read_text(errors='replace')[-4000:]}\n")
    status = "passed" if done == many else "not run"
    said = f"{done} of {many} processes had come to their end"
    check.note("Triton's kernels compiled", status, round(time.monotonic() - began, 1), said)


def sanitizers(check: Check) -> None:
    """The CUDA kernels in a program without torch: first as it is, then watched by each tool."""
    folder = ROOT / ("build/gpu-on-cpu" if check.dry else "build/gpu")
    program = [str(folder / "sanitized")]
    ended = check.step("sanitizers' program", program, 60)
    places = os.pathsep.join([os.environ.get("PATH", ""), "/usr/local/cuda/bin"])
    sanitizer = shutil.which("compute-sanitizer", path=places)
    if ended is None or ended.code != 0:
        return
    if check.dry or sanitizer is None:
        why = "it watches GPUs alone" if check.dry else "compute-sanitizer is not installed"
        check.note("sanitizers", "not run", 0.0, why)
        return

    def watch(tool: str) -> None:
        options = ["--tool", tool, "--error-exitcode", "86", "--print-limit", "20"]
        ended = check.child(tool, [sanitizer, *options, *program], 75)
        check.note(f"sanitizers: {tool}", *sanitizers_verdict(ended))

    with ThreadPoolExecutor(len(TOOLS)) as pool:
        list(pool.map(watch, TOOLS))


def sanitizers_verdict(ended: Ended) -> tuple[str, float, str]:
    """(status, seconds, message): failed where a tool found something; not run where it did not
    come to a summary, such as where the platform does not let it look at the device."""
    own = [line.strip("= ") for line in ended.said.splitlines() if line.startswith("====")]
    summaries = [line for line in own if "SUMMARY" in line]
    findings = sum(int(n) for n in re.findall(r"(\d+) (?:error|warning)s?", " ".join(summaries)))
    if findings:
        return "failed", ended.seconds, " / ".join(own)[:3000]
    if summaries and ended.code == 0:
        return "passed", ended.seconds, summaries[-1]
    return "not run", ended.seconds, ended.killed or " / ".join(own[-3:]) or last_line(ended)


def bench(check: Check, part: str, seconds: float) -> None:
    """The engine of ``bench.py`` over one part of the works; it stops in time by itself."""
    seconds = min(seconds, check.left_s - 10)
    # Relative to where the program runs: the file holds its command, and may be stored.
    file = os.path.relpath(check.folder / f"gpu_check_{part}.json", ROOT)
    command = [
        sys.executable, str(ROOT / "benchmarks/gpu_bench.py"), "--part", part, "--seconds",
        f"{seconds:.0f}", "--json", file,
        *(["--dry"] if check.dry else []),
    ]  # fmt: skip
    check.step(f"benchmark: {part}", command, seconds + 8, needs_s=20.0)


def run(check: Check, folder: Path) -> None:
    found = machine(check)
    try:
        check.keep_in(folder)
    except OSError as error:
        stop(f"cannot write into {folder}: {error.strerror}; RESULTS= names another folder")
    capability = [9, 0] if check.dry else found["gpu"][0]["capability"]
    build = ["--cpu"] if check.dry else ["--arch", ".".join(map(str, capability)), "--install"]
    check.step("build", [sys.executable, str(GPU / "build.py"), *build], 300)
    hung = first_contact(check)
    plans = {path.split(",")[0].split()[-1] for path in hung}  # as the tests' names have them
    run_files(check, " and not ".join(["not triton", *sorted(plans)]))
    bench(check, "cuda", 110)
    sanitizers(check)
    bench(check, "networks", 90)
    # Only now, for compiling keeps every processor busy and would show in the times above.
    if found["triton"]:
        compile_triton(check, capability)
        if not check.dry:
            run_files(check, "triton")
    doctor = [sys.executable, "-m", "normnorm", "doctor"]
    check.step("every layer on every backend", doctor, 120)
    if found["triton"]:
        bench(check, "triton", 60)


def main(arguments: Sequence[str] | None = None) -> int:
    """0: nothing failed; 1: something did; 2: it could not begin; 130: it was interrupted."""
    parser = argparse.ArgumentParser(prog="gpu_check.py", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="never exceeded (default 8)")
    parser.add_argument("--results", type=Path, metavar="DIR", help="default benchmarks/results")
    parser.add_argument("--dry", action="store_true", help="on a CPU, with tiny inputs")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    folder = options.results or ROOT / ("runs/gpu-check" if options.dry else "benchmarks/results")
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
        check = Check(Path(scratch), options.dry, began + 60 * options.minutes - RESERVE_S)

        def interrupt(number: int, frame: FrameType | None) -> None:
            check.deadline = 0.0  # what runs beside this thread ends too
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGTERM, interrupt)
        status = None
        try:
            run(check, folder.resolve())
        except KeyboardInterrupt:
            status = 130
            check.record["steps"].append(
                {"step": "the rest", "status": "not run", "seconds": 0.0, "message": "interrupted"}
            )
        finally:
            for child in list(check.children):
                check.kill(child)
        check.record["finished"] = now()
        check.save()
        print(gpu_summary.closing(check.record))
        print(f"results: {check.folder}")
    return (1 if check.record["failed"] else 0) if status is None else status


if __name__ == "__main__":
    sys.exit(main())
