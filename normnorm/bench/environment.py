"""Where and how the numbers of a run come about."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

import normnorm
from normnorm import backends
from normnorm.bench.results import Environment, Gpu

__all__ = ["after", "before", "commit", "cores", "cpu_name", "gpu"]

_PACKAGES = ("triton", "liger-kernel", "quack-kernels", "torchvision", "timm", "numpy")
_PACKAGE = Path(normnorm.__file__).resolve().parent


def _run(*command: str, cwd: Path | None = None) -> str | None:
    """What a program prints; None where there is none, or it fails."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_name() -> str:
    """The processor's name; Python itself knows only the architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def commit() -> tuple[str | None, bool | None]:
    """The commit that this package's files belong to, and whether some differ from it.

    An installed package may lie within somebody else's repository, which does not track it.
    """
    if _run("git", "ls-files", "--error-unmatch", "__init__.py", cwd=_PACKAGE) is None:
        return None, None
    changes = _run("git", "status", "--porcelain", "--untracked-files=no", cwd=_PACKAGE)
    commit = _run("git", "rev-parse", "--short=12", "HEAD", cwd=_PACKAGE)
    return commit, None if changes is None else bool(changes)


def _packages() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


_QUERY = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.limit")


def _driver_says(device: torch.device) -> dict[str, str]:
    """What nvidia-smi answers for the device that torch calls ``device``."""
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = () if uuid is None else (f"--id=GPU-{uuid}",)
    answer = _run(
        "nvidia-smi", f"--query-gpu={','.join(_QUERY)}", "--format=csv,noheader,nounits", *chosen
    )
    if not answer:
        return {}
    return dict(zip(_QUERY, (part.strip() for part in answer.split("\n")[0].split(","))))  # noqa: B905


def _number(text: str | None) -> float | None:
    try:
        return float(text or "")
    except ValueError:  # "[N/A]"
        return None


def gpu(device: torch.device) -> Gpu | None:
    """The accelerator behind a device; None for a CPU."""
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    driver = _driver_says(device)
    return Gpu(
        name=properties.name,
        capability=(properties.major, properties.minor),
        multiprocessors=properties.multi_processor_count,
        memory_bytes=properties.total_memory,
        l2_bytes=properties.L2_cache_size,
        driver=driver.get("driver_version"),
        clock_mhz=_number(driver.get("clocks.sm")),
        memory_clock_mhz=_number(driver.get("clocks.mem")),
        max_clock_mhz=_number(driver.get("clocks.max.sm")),
        power_limit_w=_number(driver.get("power.limit")),
    )


def _command_line() -> str:
    """As it was typed, without the folder that the program lies in."""
    program = Path(sys.argv[0])
    # `python -m normnorm` runs __main__.py of that folder.
    name = program.parent.name if program.name == "__main__.py" else program.name
    return shlex.join([name, *sys.argv[1:]])


def before(device: torch.device, seed: int) -> Environment:
    """The environment at the start of a run on ``device``."""
    at, uncommitted = commit()
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    info = backends.cpu.info()
    return Environment(
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command_line=_command_line(),
        normnorm=normnorm.__version__,
        torch=str(torch.__version__),
        python=platform.python_version(),
        packages=_packages(),
        cuda=torch.version.cuda,
        cudnn=None if cudnn is None else str(cudnn),
        commit=at,
        uncommitted=uncommitted,
        backends=normnorm.available_backends(),
        platform=platform.platform(),
        cpu=cpu_name(),
        cores=cores(),
        threads=torch.get_num_threads(),
        isa=str(info["isa"]) if "isa" in info else None,
        load_before=_load(),
        device="cuda" if device.type == "cuda" else "cpu",
        seed=seed,
    )


def after(start: Environment, device: torch.device, seconds: float) -> Environment:
    """The same at the end of the run: load, duration, and the clocks while the GPU is warm."""
    return replace(start, load_after=_load(), seconds=round(seconds, 1), gpu=gpu(device))
