"""The launchers of the CUDA kernels with a plan of the caller's choice, which the ops do not take.

On a GPU they are in the library that ``build.py`` links from ``launchers.cpp`` and the kernels; in
a dry run the kernels run on the CPU. :class:`host_cuda.harness.Call` calls them either way.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from host_cuda import harness
from host_cuda.cases import FUSIONS, fuse
from torch import Tensor

from .cases import SEED, Call, Case, make
from .rig import Rig, wait

__all__ = ["LIBRARY", "kernels", "run"]

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


def run(
    rig: Rig, kernels: harness.Launchers, row: tuple[Any, ...], columns: bool, plan: dict[str, Any],
    dtype: torch.dtype, *, noise: float = 0.7, fused: bool = False, times: int = 1,
) -> tuple[Call, list[dict[str, Tensor]]]:  # fmt: skip
    """A row of ``host_cuda.cases`` by a forced plan: (the call, output and gradients each time)."""
    kind, shape, extra = row
    groups, trailing = extra.get("num_groups", 0), extra.get("normalized_ndim", 0)
    call = make(
        rig, Case(kind, kind, shape, shape, groups, trailing), dtype,
        channels_last=columns and len(shape) == 4, noise_train=noise,
    )  # fmt: skip
    served = harness.Call(
        kind, call.input, call.weight, call.bias, num_groups=groups, normalized_ndim=trailing,
        noise_train=noise, seed=SEED, columns=columns, force=plan,
    )  # fmt: skip
    if fused:
        served = fuse(served, FUSIONS["both"])
    results = []
    for _ in range(times):
        with rig.device:  # where the harness makes its tensors
            output, stats = served.forward(kernels)
            du, dw, db = served.backward(kernels, call.grad, stats)
        results.append({"output": output, "input": du, "weight": dw, "bias": db})
    if fused:
        assert torch.equal(served.sum, call.input + served.addend)
        call = replace(
            call, input=served.sum, residual=served.residual, relu=True, grad_sum=served.grad_sum,
            found=output,
        )  # fmt: skip
    return call, results
