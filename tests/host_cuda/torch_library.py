"""The ops of namespace ``normnorm_cuda`` on CPU tensors: the CUDA backend without a GPU.

``csrc/binding/cuda.cpp`` and the kernels are compiled by g++ over the host-execution layer and
their ops registered for the CPU, so that everything between a layer and a kernel is the code that
serves a GPU: argument checks, the walk, copies, workspaces, statistics, running statistics.

``with served_by_host_run(): ...`` puts it in the registry under the CUDA backend's name, and
``NORMNORM_HOST_RUN=1 python -m pytest tests/...`` does so for all tests that run on every backend.
``python tests/host_cuda/torch_library.py`` builds it and prints where it is.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
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
BINDING = ("tensors", "cuda", "cuda_problem", "by_definition")
# The oldest torch whose stable ABI serves, as in setup.py.
TORCH_TARGET = "0x020a000000000000"
_FLAGS = [
    *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
    "-DNN_CUDA_DISPATCH_KEY=CPU",
    f"-I{harness.LAYER}",
]


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        return "needs Linux and g++"
    if harness.cuda_include() is None:
        return "needs the headers of the CUDA toolkit"
    return None


def _sources() -> list[Path]:
    csrc = ROOT / "csrc"
    return [
        *sorted((csrc / "cuda").glob("*.cu")),
        *(csrc / f"binding/{name}.cpp" for name in BINDING),
        csrc / "arguments.cpp",
        csrc / "cpu/layout.cpp",
        harness.LAYER / "torch_host.cpp",
    ]


def _digest() -> str:
    csrc = ROOT / "csrc"
    read = [
        *csrc.glob("*.*"),
        csrc / "cpu/problem.h",
        csrc / "cpu/layout.h",
        csrc / "cpu/layout.cpp",
    ]
    for folder in (csrc / "core", csrc / "cuda", csrc / "binding", harness.LAYER):
        read += [p for p in folder.iterdir() if p.suffix not in (".py", ".pyc") and p.is_file()]
    digest = hashlib.sha256(repr((_FLAGS, torch.__version__)).encode())
    for path in sorted(read):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _compile(source: Path, target: Path) -> None:
    folder = Path(torch.__file__).parent / "include"
    flags = [*_FLAGS, "-isystem", str(folder), "-isystem", str(harness.cuda_include())]
    command = ["g++", *flags, "-x", "c++", "-c", str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def build() -> Path:
    """The library; built anew where a source has changed."""
    reason = missing()
    assert reason is None, reason
    folder = Path(tempfile.gettempdir()) / f"normnorm-host-cuda-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    library = folder / f"normnorm_cuda_{_digest()}.so"
    with open(folder / "torch_library.lock", "w") as lock:  # one process builds, others wait
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as name:
                _build(Path(name), library)
    return library


def _build(folder: Path, library: Path) -> None:
    sources = _sources()
    objects = [folder / f"{i}.o" for i in range(len(sources))]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        list(pool.map(_compile, sources, objects))
    torch_folder = Path(torch.__file__).parent / "lib"
    partial = folder / "library.so"
    link = ["g++", "-shared", *map(str, objects), f"-L{torch_folder}", "-ltorch", "-ltorch_cpu"]
    subprocess.run([*link, "-lc10", "-lpthread", "-o", str(partial)], check=True)
    partial.rename(library)


_loaded: ctypes.CDLL | None = None


def load() -> ctypes.CDLL:
    """Loads the ops into this process, and tells the ladder of a device of few multiprocessors:
    every block is a thread of the operating system here."""
    global _loaded
    if _loaded is None:
        assert ops.SCHEMAS  # the import of normnorm.ops has defined them
        library = build()
        torch.ops.load_library(str(library))
        _loaded = ctypes.CDLL(str(library))
        _loaded.host_cuda_device(4, 232448, 1)
    return _loaded


def register() -> None:
    """Makes it the CUDA backend of this process; ``auto`` does not choose it."""
    load()
    backends._late.pop("cuda", None)
    backends.register_compiled("cuda", "cpu")


@contextmanager
def served_by_host_run() -> Iterator[None]:
    """The CUDA backend serves CPU tensors in this block, where it is asked for by name."""
    saved = {name: dict(getattr(backends, name)) for name in ("_backends", "_automatic", "_late")}
    register()
    try:
        yield
    finally:
        for name, registry in saved.items():
            setattr(backends, name, registry)


if __name__ == "__main__":
    print(build())
