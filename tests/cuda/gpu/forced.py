"""The CUDA kernels by their launchers, which take a tier of the caller's choice; the ops do not.

On a GPU they are in the library that ``build.py`` links from ``forced.cpp`` and the kernels; in a
dry run the kernels are those of ``host_cuda``. Either way :class:`host_cuda.harness.Call`
turns the tensors of a layer call into what the launchers are given, and calls ``forward`` and
``backward``.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from host_cuda import harness

from .rig import Rig, wait

__all__ = ["LIBRARY", "Kernels", "arrays", "kernels"]

ROOT = Path(__file__).resolve().parents[3]
LIBRARY = ROOT / "build/gpu/forced.so"
_PARAMETERS = ("weight", "bias", "grad_weight", "grad_bias")
_OPERANDS = ("input", "output", "grad_output", "residual", "activated", "addend", "sum", "grad_sum")


def arrays(problem: dict[str, Any]) -> tuple[list[int], list[float], list[int]]:
    """(numbers, reals, pointers) of a problem, in the order in which ``forced.cpp`` reads them."""
    p = problem
    numbers = [
        p["storage"], *p["geometry"], p["affine"], p["noise"], p["given_scale"], p["stream"],
        *p["position"], p["order"], p["frozen"], *(p[name][1] for name in _PARAMETERS),
        *(stride for name in _OPERANDS for stride in p[name][1]), p["relu"], p["tier"],
        p["threads"], p["blocks"], p["thread_groups"],
    ]  # fmt: skip
    reals = [p["noise_train"], p["eps"], p["alpha"], p["transform_eps"]]
    pointers = [p[name][0] for name in (*_PARAMETERS, *_OPERANDS)]
    pointers += [p["seed"], p["stats"], p.get("workspace", 0)]
    return [int(n) for n in numbers], [float(r) for r in reals], pointers


class Kernels:
    """The library of ``forced.cpp``, with the two functions that the host run's module has."""

    def __init__(self, library: Path, device: torch.device) -> None:
        self._library = ctypes.CDLL(str(library))
        self._device = device

    def forward(self, problem: dict[str, Any]) -> None:
        self._run(problem, False)

    def backward(self, problem: dict[str, Any]) -> None:
        self._run(problem, True)

    def _run(self, problem: dict[str, Any], backward: bool) -> None:
        size = ctypes.c_size_t()
        self._call("forced_workspace", problem, backward, ctypes.byref(size))
        # Filled with what no kernel may rely on.
        workspace = torch.full((size.value + 16,), 0xFF, dtype=torch.uint8, device=self._device)
        problem = {**problem, "workspace": (workspace.data_ptr() + 15) // 16 * 16}
        stream = torch.cuda.current_stream(self._device).cuda_stream
        self._call("forced_run", problem, backward, ctypes.c_void_p(stream))
        wait(self._device)

    def _call(self, name: str, problem: dict[str, Any], backward: bool, last: Any) -> None:
        numbers, reals, pointers = arrays(problem)
        error = getattr(self._library, name)(
            (ctypes.c_int64 * len(numbers))(*numbers), (ctypes.c_double * len(reals))(*reals),
            (ctypes.c_void_p * len(pointers))(*pointers), int(backward), last,
        )  # fmt: skip
        if error:
            raise RuntimeError(f"{name}: CUDA error {error}")


def kernels(rig: Rig) -> Any:
    """What :class:`host_cuda.harness.Call` calls, on the rig's device.

    Raises:
        RuntimeError: the launchers were not built.
    """
    if rig.dry:
        return harness.load(harness.build())
    if not LIBRARY.exists():
        raise RuntimeError(f"{LIBRARY.relative_to(ROOT)} is missing: `make gpu-build` makes it")
    return Kernels(LIBRARY, rig.device)
