"""Facts about this machine and what is installed, as recorded with every result."""

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A CUDA device."""

    name: str
    capability: tuple[int, int]  # (9, 0) for Hopper
    multiprocessors: int
    memory_bytes: int
    l2_bytes: int
    # From nvidia-smi; None if it fails. The first two clocks are those of the query.
    driver: str | None = None
    clock_mhz: float | None = None
    memory_clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    power_limit_w: float | None = None


def _run(*command: str, cwd: Path | None = None) -> str | None:
    """A program's output; None if it is missing or fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    """The processor's name; the platform module gives only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> tuple[str | None, bool | None]:
    """The commit of the package's files, and whether tracked files differ from it.

    (None, None) for an installed package, even inside the repository of another project.
    """
    if _run("git", "ls-files", "--error-unmatch", "__init__.py", cwd=_PACKAGE) is None:
        return None, None
    changes = _run("git", "status", "--porcelain", "--untracked-files=no", cwd=_PACKAGE)
    at = _run("git", "rev-parse", "--short=12", "HEAD", cwd=_PACKAGE)
    return at, None if changes is None else bool(changes)


def packages(names: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def command_line() -> str:
    """The command as it was typed, without the folder of the program."""
    program = Path(sys.argv[0])
    # `python -m normnorm` runs __main__.py of that folder.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def facts() -> dict[str, Any]:
    """Versions, processor, threads and the backend that the environment chooses, as plain data."""
    from . import __version__  # the package is still being imported above

    confined = hasattr(os, "sched_getaffinity")
    return {
        "normnorm": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "triton": packages(["triton"]).get("triton"),
        "commit": commit()[0],
        "platform": platform.platform(),
        "processor": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if confined else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "NORMNORM_BACKEND": os.environ.get("NORMNORM_BACKEND"),
    }


_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def gpu(device: torch.device) -> Gpu | None:
    """Properties of a CUDA device, and its nvidia-smi values; None for a CPU."""
    if device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)
    uuid = getattr(found, "uuid", None)
    options = [f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits"]
    answer = _run("nvidia-smi", *options, *([] if uuid is None else [f"--id=GPU-{uuid}"]))
    said = [part.strip() for part in (answer or "").split("\n")[0].split(",")]
    driver, *numbers = said if len(said) == len(_QUERY) else [""] * len(_QUERY)
    # nvidia-smi prints "[N/A]" for an unknown value.
    clock, memory_clock, max_clock, power = (float(n) if n[:1].isdigit() else None for n in numbers)
    return Gpu(
        name=found.name, capability=(found.major, found.minor),
        multiprocessors=found.multi_processor_count, memory_bytes=found.total_memory,
        l2_bytes=found.L2_cache_size, driver=driver or None, clock_mhz=clock,
        memory_clock_mhz=memory_clock, max_clock_mhz=max_clock, power_limit_w=power,
    )  # fmt: skip
