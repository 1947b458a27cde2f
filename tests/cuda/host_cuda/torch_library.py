"""The ops of namespace ``normnorm_cuda`` on CPU tensors: the CUDA backend without a GPU.

``csrc/binding/cuda.cpp`` and the kernels are compiled by g++ with the emulator, and their ops are
registered for the CPU, so that everything between a layer and a kernel is the code that serves a
GPU: argument checks, layout, copies, workspaces, statistics, running statistics.

``with served_by_host_run(): ...`` puts it in the registry under the CUDA backend's name, and
``NORMNORM_HOST_RUN=1 python -m pytest tests/...`` does so for all tests that run on every backend.
``python tests/cuda/host_cuda/torch_library.py`` builds it and prints where it is.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from host_cuda import harness

from normnorm import backends, ops

ROOT = harness.ROOT
BINDING = ("tensors", "cuda", "cuda_problem", "fallback")
# The oldest torch whose stable ABI serves, as in setup.py.
TORCH_TARGET = "0x020a000000000000"
_FLAGS = [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-DNN_CUDA_DISPATCH_KEY=CPU"]


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        return "needs Linux and g++"
    if harness.cuda_include() is None:
        return "needs the headers of the CUDA toolkit"
    return None


def _sources() -> list[Path]:
    """The sources other than the kernels."""
    csrc = ROOT / "csrc"
    return [
        *(csrc / f"binding/{name}.cpp" for name in BINDING),
        csrc / "common/checks.cpp",
        csrc / "common/layout.cpp",
        harness.LAYER / "host.cpp",
    ]


def build() -> Path:
    """The library; built anew where a source has changed."""
    reason = missing()
    assert reason is None, reason
    csrc = ROOT / "csrc"
    read = [
        *harness.sources_in(csrc, *(csrc / name for name in ("binding", "common", "math", "cuda"))),
        *harness.sources_in(harness.LAYER),
    ]
    state = harness.digest(read, harness.flags(), _FLAGS, torch.__version__)
    return harness.made(f"normnorm_cuda_{state}.so", _build)


def _build(library: Path) -> None:
    sources, kernels = _sources(), harness.kernel_objects()
    torch_folder = Path(torch.__file__).parent
    words = [*harness.flags(), *_FLAGS, "-isystem", str(torch_folder / "include")]
    with tempfile.TemporaryDirectory() as name:
        objects = [Path(name) / f"{i}.o" for i in range(len(sources))]
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(harness.compile_object, sources, objects, [words] * len(sources)))
        link = ["g++", "-shared", *map(str, [*kernels, *objects]), f"-L{torch_folder / 'lib'}"]
        link += ["-ltorch", "-ltorch_cpu", "-lc10", "-lpthread", "-o", str(library)]
        harness.run(link)


_loaded: ctypes.CDLL | None = None


def load() -> ctypes.CDLL:
    """Loads the ops into this process; plans are made for a device of few multiprocessors, because
    every block is a thread of the operating system here."""
    global _loaded
    if _loaded is None:
        assert ops.SCHEMAS  # the import of normnorm.ops has defined them
        library = build()
        torch.ops.load_library(str(library))
        _loaded = ctypes.CDLL(str(library))
        _loaded.host_device(4, 232448, 1, 1, 1 << 30, 0)
    return _loaded


def register() -> None:
    """Registers it as the CUDA backend of this process, which ``auto`` does not choose."""
    load()
    backends._late.pop("cuda", None)
    backends.register_compiled("cuda", "cpu")


@contextmanager
def served_by_host_run() -> Iterator[None]:
    """In this block the CUDA backend, chosen by name, serves CPU tensors."""
    saved = {name: dict(getattr(backends, name)) for name in ("_backends", "_automatic", "_late")}
    register()
    try:
        yield
    finally:
        for name, registry in saved.items():
            setattr(backends, name, registry)


if __name__ == "__main__":
    print(build())
