"""Stage: the extension, compiled in place for this machine's GPU alone.

In a dry run the same sources are compiled for the CPU, as the tests do.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from typing import Any

from gpucheck.environment import find_nvcc
from gpucheck.rig import Rig
from gpucheck.stage import ROOT, Failure, Section, main

__all__ = ["build_command", "build_environment", "read_usage"]

_USAGE = re.compile(r"Function (\S+?):\s*REG:(\d+) STACK:(\d+).*?LOCAL:(\d+)", re.S)


def architecture(rig: Rig) -> str | None:
    """As TORCH_CUDA_ARCH_LIST wants it: "9.0" for a compute capability of 9.0."""
    if rig.dry:
        return None
    import torch

    major, minor = torch.cuda.get_device_capability(rig.device)
    return f"{major}.{minor}"


def build_command() -> list[str]:
    return [sys.executable, "setup.py", "build_ext", "--inplace"]


def build_environment(arch: str) -> dict[str, str]:
    """Kernels for CPU and CUDA are required, for one architecture: no build without them."""
    return {
        **os.environ, "NORMNORM_NATIVE": "1", "NORMNORM_CUDA": "1", "TORCH_CUDA_ARCH_LIST": arch,
    }  # fmt: skip


def read_usage(text: str) -> dict[str, Any] | None:
    """What ``cuobjdump --dump-resource-usage`` says of all kernels together."""
    found = [(name, *map(int, numbers)) for name, *numbers in _USAGE.findall(text)]
    if not found:
        return None
    return {
        "count": len(found),
        "largest_registers": max(registers for _, registers, _, _ in found),
        "spilling": sorted(name for name, _, stack, local in found if stack or local),
    }


def _usage(library: str) -> dict[str, Any] | None:
    program = shutil.which("cuobjdump")
    if program is None:
        return None
    try:
        done = subprocess.run(
            [program, "--dump-resource-usage", library], capture_output=True, text=True, timeout=60
        )
    except subprocess.SubprocessError:
        return None
    return read_usage(done.stdout)


def _compile(section: Section, arch: str) -> list[str]:
    """Runs the build; the lines it meant for a reader.

    Raises:
        Failure: it did not come to its end, with what it said last.
    """
    command = build_command()
    section.data["command"] = command
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=build_environment(arch), capture_output=True, text=True,
            errors="replace", timeout=max(1.0, section.left_s),
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        raise Failure(f"the build did not end within {late.timeout:.0f} s") from None
    output = done.stdout + done.stderr
    if done.returncode:
        print(output[-8000:])
        lines = [line for line in output.splitlines() if line.strip()]
        ours = [line for line in lines if line.startswith("normnorm: ")]
        last = (ours or lines or ["it said nothing"])[-1]
        raise Failure(f"the build failed with exit status {done.returncode}: {last}")
    return [line for line in output.splitlines() if line.startswith("normnorm: ")]


def _link_launchers(rig: Rig) -> None:
    """The kernels as the tests call them with rungs of their choice."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gpu import forced

    forced.kernels(rig)


def run(section: Section) -> None:
    section.data = {
        "command": [], "architecture": None, "nvcc": find_nvcc(), "seconds": 0.0, "libraries": {},
        "kernels": None, "said": [],
    }  # fmt: skip
    section.save()
    began = time.time()
    rig = Rig.find(section.dry)  # in a dry run this builds
    if not section.dry:
        arch = architecture(rig)
        assert arch is not None
        section.data["architecture"] = arch
        section.data["said"] = _compile(section, arch)
        libraries = sorted((ROOT / "normnorm").glob("*.so"))
        section.data["libraries"] = {path.name: path.stat().st_size for path in libraries}
        usages = [usage for usage in map(_usage, map(str, libraries)) if usage]
        section.data["kernels"] = max(usages, key=lambda usage: usage["count"], default=None)
    _link_launchers(rig)
    section.data["seconds"] = round(time.time() - began, 1)
    section.save()
    for line in section.data["said"]:
        print(line)
    # Another process: this one has looked for the backends before the library was there.
    program = (
        "from gpucheck.rig import Rig; import sys; "
        "reason = Rig.find().reasons()['cuda']; sys.exit(reason)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["it ended without a word"]
        raise Failure(f"built, but backend 'cuda' cannot run: {said[-1]}")


if __name__ == "__main__":
    main(run)
