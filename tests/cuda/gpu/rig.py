"""The device that the tests run on.

:class:`Rig` is a CUDA device or, where the environment's :data:`VARIABLE` says so, the CPU in its
place: "dry" runs the CUDA kernels compiled for the CPU (``host_cuda``) on small
tensors; "compile sm_90" compiles the Triton kernels that the tests would launch on a GPU of that
architecture, with the tensors of full size on the CPU, and runs none.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from raw_ops import CPU_UNIT, GPU_UNIT

import normnorm
from normnorm import backends
from normnorm.backends import cpu

T = TypeVar("T")

VARIABLE = "NORMNORM_GPU_CHECK"
# The backends that serve a GPU's tensors.
BACKENDS = ("cuda", "triton")
# The profiler's names of a device's work, and the ops that ask for it in a dry run.
_DEVICE_WORK = {"kernel", "gpu_memset", "gpu_memcpy"}
_HOST_WORK = ("normnorm", "aten::random_")


class NoGpu(RuntimeError):
    """There is no GPU to run on, and no dry run was asked for."""


class Hang(RuntimeError):
    """A kernel has not ended in time."""


def mode() -> str:
    """One of "gpu", "dry" and "compile"."""
    return os.environ.get(VARIABLE, "gpu").split()[0]


def wait(device: torch.device, seconds: float = 10.0) -> None:
    """Polls the device's work, because a wait in the driver cannot be interrupted.

    Raises:
        Hang: it has not ended in so many seconds.
        RuntimeError: the work failed.
    """
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    until = time.monotonic() + seconds
    while not event.query():
        if time.monotonic() > until:
            raise Hang(f"the device has not ended its work within {seconds:.0f} s")
        time.sleep(0.001)


@dataclass(frozen=True)
class Rig:
    """What to run on.

    Attributes:
        device: where tensors go.
        small: whether tensors are as small as the CUDA kernels' run on the CPU wants them.
    """

    device: torch.device
    small: bool = False

    @classmethod
    def find(cls) -> "Rig":
        """The rig that the environment asks for.

        Raises:
            NoGpu: there is no CUDA device.
        """
        if mode() == "dry":
            _register_host_build()
            return cls(torch.device("cpu"), small=True)
        if mode() == "compile":
            _register_compilation(os.environ[VARIABLE].split()[1])
            return cls(torch.device("cpu"))
        if not torch.cuda.is_available():
            raise NoGpu("no GPU; `make gpu-check DRY=1` runs these tests on the CPU")
        return cls(torch.device("cuda", torch.cuda.current_device()))

    @property
    def dry(self) -> bool:
        """Whether the CPU is in the GPU's place."""
        return self.device.type == "cpu"

    def pick(self, gpu: T, dry: T) -> T:
        """A size for a GPU, or the one for the CUDA kernels' run on the CPU."""
        return dry if self.small else gpu

    def serving(self) -> list[str]:
        """The backends that can run here."""
        return [name for name, reason in self.reasons().items() if reason is None]

    def reasons(self) -> dict[str, str | None]:
        """The backends under test, with None or the reason why they cannot run."""
        found = normnorm.available_backends()
        reasons = {name: found[name] for name in BACKENDS}
        for name, reason in reasons.items():
            if reason is None and backends.get(name).device_type not in (None, self.device.type):
                served = backends.get(name).device_type
                reasons[name] = f"serves {served} tensors; this run has {self.device.type} tensors"
        return reasons

    @property
    def unit(self) -> float:
        """The rounding unit of float32 arithmetic."""
        return CPU_UNIT if self.dry else GPU_UNIT

    @contextmanager
    def forced(self, **plan: Any) -> Iterator[None]:
        """In this block the CUDA kernels run by that plan (``torch_library.force``)."""
        from host_cuda import torch_library

        library = torch_library.load().library if self.dry else cpu.library()
        torch_library.force(library, **plan)
        try:
            yield
        finally:
            torch_library.force(library)

    def synchronize(self) -> None:
        """Waits for the device; raises its errors."""
        if not self.dry:
            torch.cuda.synchronize(self.device)

    def serves(self) -> bool:
        """Whether the device still works for this process."""
        try:
            if not self.dry:
                wait(self.device)
        except RuntimeError:
            return False
        return True

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
        """A context on a new stream that starts after the work so far."""
        if self.dry:
            return nullcontext()
        stream = torch.cuda.Stream(self.device)
        stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(stream)

    def work_of(self, step: Callable[[], Any]) -> list[str]:
        """The names of the kernels, copies and fills of ``step``; on a CPU, of its ops."""
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not self.dry:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        step()  # warm up
        self.synchronize()
        with torch.profiler.profile(activities=activities) as profile:
            step()
            self.synchronize()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profile.export_chrome_trace(str(path))
            return work_in(json.loads(path.read_text(encoding="utf-8")), self.dry)

    def allocated(self) -> int:
        """Bytes of live tensors on the device; 0 on a CPU."""
        return 0 if self.dry else torch.cuda.memory_allocated(self.device)

    def free_cache(self) -> None:
        """Frees cached memory for the next shape."""
        if not self.dry:
            torch.cuda.empty_cache()


def work_in(trace: dict[str, Any], dry: bool) -> list[str]:
    """A device's work in a profile in Chrome's format; in a dry run, the ops."""
    events = trace["traceEvents"]
    if dry:
        ops = [e["name"] for e in events if e.get("cat") == "cpu_op"]
        return [name for name in ops if name.startswith(_HOST_WORK)]
    return [e["name"] for e in events if e.get("cat") in _DEVICE_WORK]


@cache
def _register_host_build() -> None:
    """Registers backend "cuda" for CPU tensors: the kernels compiled for the CPU."""
    from host_cuda import torch_library

    reason = torch_library.missing()
    if reason is not None:
        raise NoGpu(f"the CUDA kernels cannot be compiled for the CPU here: it {reason}")
    torch_library.register()


@cache
def _register_compilation(target: str) -> AbstractContextManager[Any]:
    """Backend "triton" for CPU tensors: each launch compiles its kernel into Triton's cache, under
    the key that a launch on a GPU of that architecture looks for, and ends there."""
    from triton_tools import ahead

    from normnorm.backends import triton

    compiling = ahead.compiling(target)
    compiling.__enter__()
    triton.device_type = lambda: "cpu"
    backends._late.pop("triton", None)
    triton.register()
    return compiling  # kept in the cache, because it ends when it is collected
