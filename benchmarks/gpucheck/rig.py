"""The one place that knows whether there is a GPU.

:class:`Rig` is what the stages and ``tests/gpu`` run on: a CUDA device, or in a dry run the CPU
with the CUDA kernels' own source compiled for it (``tests/host_cuda``) in the place of backend
"cuda". Everything else is written once for both.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import normnorm
from gpucheck.stage import ROOT, Failure
from normnorm import backends

__all__ = ["BACKENDS", "VARIABLE", "NoGpu", "Rig", "why_no_gpu", "work_in"]

T = TypeVar("T")

# "dry" asks for the CPU; anything else for a GPU.
VARIABLE = "NORMNORM_GPU_CHECK"
# Those that serve a GPU's tensors.
BACKENDS = ("cuda", "triton")
# What a profile calls work of a device, and what stands for it on a CPU.
_DEVICE_WORK = {"kernel", "gpu_memset", "gpu_memcpy"}
_HOST_WORK = ("normnorm", "aten::random_")


class NoGpu(Failure):
    """There is no GPU to run on, and no dry run was asked for."""


def why_no_gpu() -> str | None:
    """None where torch sees a GPU, else a sentence."""
    if torch.cuda.is_available():
        return None
    built = torch.version.cuda or torch.version.hip
    reason = f"torch {torch.__version__} finds none" if built else (
        f"torch {torch.__version__} was built without CUDA"
    )  # fmt: skip
    return f"no GPU: {reason}. `make gpu-check DRY=1` runs everything else without one"


@dataclass(frozen=True)
class Rig:
    """What to run on.

    Attributes:
        dry: whether the CPU stands in for a GPU.
        device: where tensors go.
    """

    dry: bool
    device: torch.device

    @classmethod
    def find(cls, dry: bool | None = None) -> Rig:
        """The rig that ``dry`` (None: the environment's :data:`VARIABLE`) asks for.

        Raises:
            NoGpu: there is no CUDA device.
            Failure: the CPU build of the kernels that a dry run needs is not possible here.
        """
        if dry is None:
            dry = os.environ.get(VARIABLE) == "dry"
        if dry:
            _register_host_build()
            return cls(True, torch.device("cpu"))
        reason = why_no_gpu()
        if reason is not None:
            raise NoGpu(reason)
        return cls(False, torch.device("cuda", torch.cuda.current_device()))

    def pick(self, gpu: T, dry: T) -> T:
        """A size for a GPU, or the one that a CPU can do in its place."""
        return dry if self.dry else gpu

    def serving(self) -> list[str]:
        """The backends under test that can run here."""
        return [name for name, reason in self.reasons().items() if reason is None]

    def reasons(self) -> dict[str, str | None]:
        """Those backends, with None or why they cannot run."""
        found = normnorm.available_backends()
        reasons = {name: found[name] for name in BACKENDS}
        for name, reason in reasons.items():
            if reason is None and backends.get(name).device_type not in (None, self.device.type):
                served = backends.get(name).device_type
                reasons[name] = f"serves {served} tensors; this run has {self.device.type} tensors"
        return reasons

    @property
    def unit(self) -> float:
        """The rounding unit of float32 arithmetic: a GPU's special-function instructions err by
        2^-22, a C library's functions by little more than float32 itself."""
        return 2.0**-24 if self.dry else 2.0**-22

    # --- the device's own ways ---

    def synchronize(self) -> None:
        """Waits for the device; raises what went wrong on it."""
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def capture(self, step: Callable[[], T]) -> Callable[[], T]:
        """``step`` as a CUDA graph: each call of the result replays it into the same tensors."""
        if self.dry:
            return step
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                step()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()

        def replay() -> T:
            graph.replay()
            return results

        return replay

    def stream(self) -> Any:
        """A block on a stream of its own, which starts after what was asked for so far."""
        if self.dry:
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def work_of(self, step: Callable[[], Any]) -> list[str]:
        """The names of the kernels, copies and fills that ``step`` has the device do.

        On a CPU the ops that would launch them.
        """
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self.dry:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        step()  # what happens once is not counted
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return work_in(json.loads(path.read_text(encoding="utf-8")), self.dry)

    def allocated(self) -> int:
        """Bytes of tensors alive on the device; 0 on a CPU, which does not count them."""
        return 0 if self.dry else torch.cuda.memory_allocated(self.device)

    def free_cache(self) -> None:
        """Gives memory of dead tensors back, so that the next shape finds room."""
        if not self.dry:
            torch.cuda.empty_cache()

    @contextmanager
    def backend(self, name: str) -> Iterator[None]:
        """That backend for every layer in the block."""
        with normnorm.use_backend(name):
            yield


def work_in(trace: dict[str, Any], dry: bool) -> list[str]:
    """What a device did by a profile in Chrome's format; in a dry run, the ops that ask for it."""
    events = trace["traceEvents"]
    if dry:
        ops = [e["name"] for e in events if e.get("cat") == "cpu_op"]
        return [name for name in ops if name.startswith(_HOST_WORK)]
    return [e["name"] for e in events if e.get("cat") in _DEVICE_WORK]


# The registration that stands for a GPU's, kept for the rest of the process.
_host_build: AbstractContextManager[None] | None = None


def _register_host_build() -> None:
    """Backend "cuda" for CPU tensors: the kernels' source, compiled by the host's compiler."""
    global _host_build
    if _host_build is not None:
        return
    tests = str(ROOT / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    from host_cuda import torch_library

    reason = torch_library.missing()
    if reason is not None:
        raise Failure(f"the CUDA kernels cannot be compiled for the CPU here: it {reason}")
    build = torch_library.served_by_host_run()
    build.__enter__()
    _host_build = build
