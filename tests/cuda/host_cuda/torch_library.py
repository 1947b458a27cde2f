"""The ops of namespace ``normnorm_cuda`` on CPU tensors: the CUDA backend without a GPU.

``csrc/binding/cuda.cpp`` and the kernels are compiled by g++ with the emulator of this folder, and
their ops are registered for the CPU, so that everything between a layer and a kernel is the code
that serves a GPU: argument checks, layout, copies, workspaces, statistics, running statistics.

``with served_by_host_run(): ...`` puts it in the registry under the CUDA backend's name, and
``NORMNORM_HOST_RUN=1 python -m pytest tests/...`` does so for all tests that run on every backend.
"""

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from normnorm import backends, ops

ROOT = Path(__file__).resolve().parents[3]
CSRC = ROOT / "csrc"
HERE = ROOT / "tests/cuda/host_cuda"
BINDING = ("tensors", "cuda", "cuda_problem")
# The oldest torch whose stable ABI serves, as in setup.py.
TORCH_TARGET = "0x020a000000000000"
# Without -g and -O1, each of which doubles the time: a report names the function, UBSan's the line.
SANITIZE = ["-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# A storage type that is its own compute type, and one that is not: all share their templates.
SANITIZED = ("float32", "bfloat16", "launch")
# Of cuda::Tier.
TIERS = ("auto", "block", "cluster", "grid", "streaming")


def cuda_include() -> Path | None:
    """The toolkit's headers: the kernels use NVIDIA's own vector types and conversions."""
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc:
        candidates.insert(0, str(Path(nvcc).resolve().parent.parent))
    for folder in candidates:
        if folder and (Path(folder) / "include/cuda_fp16.h").exists():
            return Path(folder) / "include"
    return None


def missing() -> str | None:
    """Why it cannot be built here, or None."""
    if not sys.platform.startswith("linux") or not shutil.which("g++"):
        return "needs Linux and g++"
    if cuda_include() is None:
        return "needs the headers of the CUDA toolkit"
    return None


# --- the build -----------------------------------------------------------------------------------


def flags() -> list[str]:
    """Compiler flags of the kernels and their callers."""
    return [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG"),
        *(f"-I{HERE}", "-DNN_CUDA_RUNTIME=<host_cuda.h>", "-isystem", str(cuda_include())),
    ]


def made(name: str, make: Callable[[Path], object]) -> Path:
    """The file of that name in the folder of builds. If it is missing, one process makes it and the
    others wait."""
    folder = Path(tempfile.gettempdir()) / f"normnorm-host-cuda-{os.getuid()}"
    folder.mkdir(exist_ok=True)
    target = folder / name
    with open(folder / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.exists():
            partial = folder / f"{name}.partial"
            make(partial)
            partial.rename(target)
    return target


def digest(files: Iterable[Path], *words: object) -> str:
    """A hash of the sources and options of a build."""
    found = hashlib.sha256(repr(words).encode())
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def sources_in(*folders: Path) -> list[Path]:
    """The C++ sources in these folders."""
    python = (".py", ".pyc")
    return sorted(p for f in folders for p in f.iterdir() if p.is_file() and p.suffix not in python)


def run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


def compiled(sources: Sequence[Path], read: Sequence[Path], words: Sequence[str]) -> list[Path]:
    """Object files, made anew where a file that is ``read`` or a flag has changed."""
    state = digest(read, words, torch.__version__)

    def one(source: Path) -> Path:
        command = ["g++", *words, "-x", "c++", "-c", str(source), "-o"]
        return made(f"{source.stem}_{state}.o", lambda target: run([*command, str(target)]))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, sources))


def _sanitizers() -> list[str]:
    """Flags, where the environment says that this process has the sanitizers loaded."""
    return SANITIZE if os.environ.get("NORMNORM_HOST_CUDA_SANITIZED") else []


def _kernel_sources() -> list[Path]:
    folders = (CSRC / name for name in ("common", "math", "cuda"))
    return [*sources_in(*folders), *sorted(HERE.glob("*.h"))]


def kernel_objects() -> list[Path]:
    """The kernels' object files; of all storage types, those of SANITIZED with sanitizers."""
    sources = sorted((CSRC / "cuda").glob("*.cu"))
    sanitized = [source for source in sources if _sanitizers() and source.stem in SANITIZED]
    plain = [source for source in sources if source not in sanitized]
    read = _kernel_sources()
    return [
        *compiled(plain, read, flags()), *compiled(sanitized, read, [*flags(), *_sanitizers()])
    ]  # fmt: skip


def build() -> Path:
    """The library; built anew where a source has changed."""
    assert missing() is None, missing()
    torch_folder = Path(torch.__file__).parent
    words = [*flags(), *_sanitizers(), f"-DTORCH_TARGET_VERSION={TORCH_TARGET}"]
    words += ["-DNN_CUDA_DISPATCH_KEY=CPU", "-isystem", str(torch_folder / "include")]
    sources = [CSRC / f"binding/{name}.cpp" for name in BINDING]
    sources += [CSRC / f"common/{name}.cpp" for name in ("checks", "layout")]
    read = [*_kernel_sources(), *sources_in(CSRC / "binding", HERE)]
    replaced = "-Daoti_torch_empty_strided=host_cuda_empty_strided"
    objects = [
        *kernel_objects(), *compiled([HERE / "host.cpp"], read, words),
        *compiled(sources, read, [*words, replaced]),
    ]  # fmt: skip
    link = ["g++", "-shared", *_sanitizers(), *map(str, objects), f"-L{torch_folder / 'lib'}"]
    link += ["-ltorch", "-ltorch_cpu", "-lc10", "-lpthread", "-o"]
    name = f"normnorm_cuda_{digest(objects, link)}.so"
    return made(name, lambda target: run([*link, str(target)]))


# --- the emulator --------------------------------------------------------------------------------


def force(
    library: ctypes.CDLL, tier: str = "auto", threads: int = 0, blocks: int = 0,
    thread_groups: int = 0,
) -> None:  # fmt: skip
    """The plan of the next passes, as normnorm_cuda_force(); by default the planner's."""
    library.normnorm_cuda_force(TIERS.index(tier), threads, blocks, thread_groups)


class Launch(NamedTuple):
    """Blocks, blocks of a cluster, whether they all run at the same time."""

    blocks: int
    cluster: int
    cooperative: bool


class Host:
    """The library's own functions: the emulator's settings, and the plan of the next passes."""

    def __init__(self) -> None:
        library = build()
        torch.ops.load_library(str(library))
        self.library = ctypes.CDLL(str(library))
        self.library.host_sites.restype = self.library.host_refusal.restype = ctypes.c_char_p
        self.library.host_offsets.restype = ctypes.c_uint64
        self.reset()

    def reset(self) -> None:
        """A device of few multiprocessors, because every block is a thread of the operating system
        here; threads in order, plans by the planner."""
        self.device(4, 232448, True)
        self.configure(0)
        self.force()
        self.launches()

    def device(
        self, multiprocessors: int, shared_bytes: int, clusters: bool, cooperative: bool = True,
        co_resident: int = 1 << 30, refuse_cooperative: bool = False,
    ) -> None:  # fmt: skip
        self.library.host_device(
            multiprocessors, shared_bytes, clusters, cooperative, co_resident, refuse_cooperative
        )

    def configure(self, order: int, watch: bool = False, skip: str = "") -> None:
        self.library.host_configure(order, watch, skip.encode())

    def force(self, **plan: Any) -> None:
        force(self.library, **plan)

    def sites(self) -> set[str]:
        """The barriers that the kernels have reached, "file:line"."""
        return set(self.library.host_sites().decode().split())

    def launches(self) -> list[Launch]:
        """Those since the last call, 64 at most."""
        numbers = (ctypes.c_int * 192)()
        count = self.library.host_launches(numbers, ctypes.c_size_t(64))
        return [Launch(*numbers[3 * i : 3 * i + 3]) for i in range(min(count, 64))]

    def refusal(self, geometry: Sequence[int]) -> str:
        return self.library.host_refusal((ctypes.c_int64 * 5)(*geometry)).decode()

    def offsets(self, numbers: Sequence[int]) -> tuple[int, int]:
        """As host_offsets()."""
        at = ctypes.c_int64()
        noise = self.library.host_offsets(
            (ctypes.c_int64 * len(numbers))(*numbers), ctypes.byref(at)
        )
        return at.value, noise


@cache
def load() -> Host:
    """Loads the ops into this process."""
    assert ops.SCHEMAS  # the import of normnorm.ops has defined them
    return Host()


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
