"""The Triton kernels compiled ahead of time, through the product's own launches.

A stand-in for the GPU's driver lets every launch compile: the product runs on CPU tensors with all
its code except the execution. The result is the binaries of all kernels that an op would launch.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget

from normnorm import backends
from normnorm.triton_kernels import launch, plan

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class StandInDriver:
    """The parts of a driver that a launch uses before it executes."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # a key of Triton's cache: one for each target

    def get_current_stream(self, device: Any) -> int:
        return 0


@dataclass(frozen=True)
class Compiled:
    """One launch: the kernel's name, what it was compiled for, its binary, its grid."""

    name: str
    spec: Any
    kernel: Any
    grid: tuple[int, ...]

    @property
    def asm(self) -> dict[str, Any]:
        return self.kernel.asm


@contextmanager
def compiling(target: str) -> Iterator[list[Compiled]]:
    """In this context, backend "triton" takes tensors of any device, and its launches compile for
    the target ("sm_90"), are appended to the list, and do nothing else."""
    found: list[Compiled] = []
    driver, run, fast = triton.runtime.driver, triton.runtime.JITFunction.run, plan.FAST

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        spec = next((a for a in args if type(a).__name__ == "Spec"), None)
        found.append(Compiled(self.fn.__name__, spec, kernel, tuple(grid)))
        return kernel

    registered = dict(backends._backends)
    passes = (launch.normal_norm_forward, launch.normal_norm_backward, launch.fold_running_)
    backends._backends["triton"] = backends.Backend("triton", None, *passes)
    named = TARGETS.get(target) or GPUTarget("cuda", int(target.removeprefix("sm_")), 32)
    driver.set_active(StandInDriver(named))
    triton.runtime.JITFunction.run = compile_only
    plan.FAST = target.startswith("sm_")
    plan._plans.clear()
    try:
        yield found
    finally:
        backends._backends = registered
        triton.runtime.JITFunction.run = run
        plan.FAST = fast
        plan._plans.clear()
        driver._active = None


def compiled(target: str, work: Callable[[], Any]) -> list[Compiled]:
    with compiling(target) as found:
        work()
    return found
