"""The launchers of the CUDA kernels with a plan of the caller's choice, which the ops do not take.

On a GPU they are in the library that ``build.py`` links from ``launchers.cpp`` and the kernels; in
a dry run the kernels run on the CPU. :class:`host_cuda.harness.Call` calls them either way.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from host_cuda import harness

from .rig import Rig, wait

__all__ = ["LIBRARY", "kernels"]

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "build/gpu/launchers.so"


class _OnGpu(harness.Launchers):
    def _stream(self) -> int:
        return torch.cuda.current_stream(self._device).cuda_stream

    def _run(self, problem: dict[str, Any], backward: bool) -> None:
        super()._run(problem, backward)
        wait(self._device)


def kernels(rig: Rig) -> harness.Launchers:
    """For tensors of the rig's device.

    Raises:
        RuntimeError: the launchers were not built.
    """
    if rig.dry:
        return harness.HostKernels()
    if not LIBRARY.exists():
        raise RuntimeError(f"{LIBRARY.relative_to(ROOT)} is missing: `make gpu-build` makes it")
    return _OnGpu(LIBRARY, rig.device)
