"""Stage: which machine, which versions, which sources."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

import normnorm
from gpucheck.rig import Rig
from gpucheck.stage import COMMAND, ROOT, Section, main

__all__ = ["find_nvcc", "nvidia_smi", "said_by"]

_PACKAGES = ("triton", "numpy", "scipy", "scikit-learn", "pytest", "torchvision", "timm")
_ASKED = (
    "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit",
    "power.draw", "temperature.gpu", "utilization.gpu", "memory.total", "memory.used",
    "persistence_mode", "ecc.mode.current",
)  # fmt: skip
# What the results depend on.
_SOURCES = ("normnorm", "csrc", "triton_kernels", "benchmarks", "tests/gpu", "setup.py")


def said_by(*command: str, seconds: float = 20) -> str | None:
    """What a program prints; None where it is missing, fails or does not end."""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, cwd=ROOT, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def nvidia_smi() -> dict[str, str] | None:
    """Driver, clocks, power and temperature of the first GPU; None where nobody can be asked."""
    # As torch's device 0 does, this counts among the visible ones only where that is a number.
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0]
    which = ["-i", visible] if visible.isdigit() else []
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    said = said_by(program, *which, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader")
    values = [value.strip() for value in (said or "").splitlines()[0].split(",")] if said else []
    return dict(zip(_ASKED, values, strict=True)) if len(values) == len(_ASKED) else None


def find_nvcc() -> str | None:
    """The compiler's path, looked for where setup.py does and in the same order."""
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    wheels = [f for p in sys.path for f in sorted(Path(p or ".").glob("nvidia/cu[0-9]*"))]
    places = [
        *(f"{home}/bin/nvcc" for home in homes),
        "nvcc",
        *(f"{home}/bin/nvcc" for home in ("/usr/local/cuda", *wheels)),
    ]
    return next((found for found in map(shutil.which, places) if found), None)


def _nvcc_version() -> str | None:
    nvcc = find_nvcc()
    said = said_by(nvcc, "--version") if nvcc else None
    return next((line for line in (said or "").splitlines() if "release" in line), None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _source() -> dict[str, Any]:
    """The commit, where git knows one, and in any case a hash of the sources as they are."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.suffix in (".py", ".h", ".cuh", ".cu", ".cpp"):
                digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    commit = said_by("git", "rev-parse", "HEAD")
    changes = said_by("git", "status", "--porcelain", "--untracked-files=no") if commit else None
    return {
        "commit": commit,
        "uncommitted": None if changes is None else bool(changes),
        "digest": digest.hexdigest()[:16],
    }


def _gpu(rig: Rig) -> dict[str, Any]:
    facts = torch.cuda.get_device_properties(rig.device)
    return {
        "name": facts.name,
        "capability": [facts.major, facts.minor],
        "multiprocessors": facts.multi_processor_count,
        "memory_bytes": facts.total_memory,
        "l2_bytes": facts.L2_cache_size,
        "shared_bytes": getattr(facts, "shared_memory_per_block_optin", None),
    }


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    named = (line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def run(section: Section) -> None:
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    section.data = {
        "dry": section.dry,
        "command": shlex.split(os.environ.get(COMMAND, shlex.join(sys.argv))),
        "source": _source(),
        "gpu": None,
        "nvidia_smi": None if section.dry else nvidia_smi(),
        "versions": {
            "normnorm": normnorm.__version__,
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            "cuda": torch.version.cuda,
            "hip": torch.version.hip,
            "cudnn": None if cudnn is None else str(cudnn),
            "nvcc": _nvcc_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "platform": platform.platform(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
    }
    section.save()
    if not section.dry:
        section.data["gpu"] = _gpu(Rig.find(False))  # which says so where there is none
    device = section.data["gpu"]["name"] if section.data["gpu"] else section.data["cpu"]
    torch_version = section.data["versions"]["torch"]
    print(f"{device}; torch {torch_version}; commit {section.data['source']['commit']}")


if __name__ == "__main__":
    main(run)
