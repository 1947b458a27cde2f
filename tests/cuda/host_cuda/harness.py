"""Builds csrc/cuda for the CPU, on the runtime of this folder, and calls its launchers.

A :class:`Call` holds the tensors of one layer call and turns them into the launchers' problem:
layout, strides, parameters and noise, as the binding does on a GPU.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import math
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normnorm import reference
from normnorm.noise import standard_normals
from normnorm.statistics import Row, statistics_dtype

ROOT = Path(__file__).resolve().parents[3]
CUDA = ROOT / "csrc/cuda"
LAYER = ROOT / "tests/cuda/host_cuda"
# Without -g, which doubles the time: a report names the function, and UBSan's the line.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
STORAGE = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
TIERS = {"auto": 0, "block": 1, "cluster": 2, "grid": 3, "streaming": 4}
AFFINE = {"group": 0, "run": 1, "element": 2, "column": 3}


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


def flags(sanitize: bool = False) -> list[str]:
    """Compiler flags of the kernels and their callers."""
    include = cuda_include()
    assert include is not None
    return [
        *("-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-DNDEBUG"),
        *(SANITIZE if sanitize else []),
        *(f"-I{LAYER}", "-DNN_CUDA_RUNTIME=<host_cuda.h>", "-isystem", str(include)),
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


def _sources() -> list[Path]:
    """The sources of the kernels and their launchers."""
    return sources_in(CUDA, ROOT / "csrc/common", ROOT / "csrc/math", LAYER)


def run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stderr}"


def compile_object(source: Path, target: Path, words: Sequence[str]) -> None:
    run(["g++", *words, "-x", "c++", "-c", str(source), "-o", str(target)])


def kernel_objects(sanitize: bool = False) -> list[Path]:
    """The kernels' object files, rebuilt where a source or a flag has changed."""
    words = flags(sanitize)
    state = digest(_sources(), words)

    def one(source: Path) -> Path:
        name = f"{source.stem}_{state}.o"
        return made(name, lambda target: compile_object(source, target, words))

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, sorted(CUDA.glob("*.cu"))))


def build() -> Path:
    """The kernels and their launchers as a library for ctypes.

    With sanitizers where the environment says that this process has them loaded.
    """
    sanitize = bool(os.environ.get("NORMNORM_HOST_CUDA_SANITIZED"))
    objects, words = kernel_objects(sanitize), flags(sanitize)

    def make(target: Path) -> None:
        sources = [str(LAYER / name) for name in ("launchers.cpp", "host.cpp")]
        link = ["-shared", *sources, *map(str, objects), "-lpthread", "-o", str(target)]
        run(["g++", *words, *link])

    return made(f"host_cuda_{digest(_sources(), words)}.so", make)


_PARAMETERS = ("weight", "bias", "grad_weight", "grad_bias")
_OPERANDS = ("input", "output", "grad_output", "residual", "activated", "addend", "sum", "grad_sum")


def arrays(problem: dict[str, Any]) -> tuple[list[int], list[float], list[int]]:
    """(numbers, reals, pointers) of a problem, in the order of ``launchers.cpp``."""
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


class Launchers:
    """The launchers in a library with ``launchers.cpp``, for tensors of a device."""

    def __init__(self, library: Path, device: torch.device) -> None:
        self._library = ctypes.CDLL(str(library))
        self._library.launcher_message.restype = ctypes.c_char_p
        self._library.launcher_refusal.restype = ctypes.c_char_p
        self._device = device

    def forward(self, problem: dict[str, Any]) -> None:
        self._run(problem, False)

    def backward(self, problem: dict[str, Any]) -> None:
        self._run(problem, True)

    def plan(self, problem: dict[str, Any], backward: bool) -> list[int]:
        """Tier, threads, blocks of a thread group, thread groups, chunks in shared memory."""
        plan = (ctypes.c_int * 5)()
        self._call("launcher_plan", problem, backward, plan)
        return list(plan)

    def refusal(self, problem: dict[str, Any]) -> str | None:
        said = self._library.launcher_refusal(*_as_c(problem))
        return None if said is None else said.decode()

    def _run(self, problem: dict[str, Any], backward: bool) -> None:
        size = ctypes.c_size_t()
        self._call("launcher_workspace", problem, backward, ctypes.byref(size))
        # NaN, in whatever type it is read
        workspace = torch.full((size.value + 16,), 0xFF, dtype=torch.uint8, device=self._device)
        problem = {**problem, "workspace": (workspace.data_ptr() + 15) // 16 * 16}
        self._call("launcher_run", problem, backward, ctypes.c_void_p(self._stream()))

    def _stream(self) -> int:
        return 0

    def _call(self, name: str, problem: dict[str, Any], backward: bool, last: Any) -> None:
        error = getattr(self._library, name)(*_as_c(problem), int(backward), last)
        if error:
            said = self._library.launcher_message().decode() if error < 0 else f"CUDA error {error}"
            raise RuntimeError(f"{name}: {said}")


def _as_c(problem: dict[str, Any]) -> tuple[Any, ...]:
    types = (ctypes.c_int64, ctypes.c_double, ctypes.c_void_p)
    return tuple((t * len(a))(*a) for t, a in zip(types, arrays(problem), strict=True))


class HostKernels(Launchers):
    """The launchers with the kernels on the CPU, and the emulator's settings (``host.cpp``)."""

    def __init__(self, library: Path | None = None) -> None:
        super().__init__(library or build(), torch.device("cpu"))
        self._library.host_sites.restype = ctypes.c_char_p
        self._library.host_offsets.restype = ctypes.c_uint64

    def device(
        self, multiprocessors: int, shared_bytes: int, clusters: bool, cooperative: bool = True,
        co_resident: int = 1 << 30, refuse_cooperative: bool = False,
    ) -> None:  # fmt: skip
        self._library.host_device(
            multiprocessors, shared_bytes, clusters, cooperative, co_resident, refuse_cooperative
        )

    def configure(self, order: int, watch: bool = False, skip: str = "") -> None:
        self._library.host_configure(order, watch, skip.encode())

    def sites(self) -> set[str]:
        """The barriers that the kernels have reached, "file:line"."""
        return set(self._library.host_sites().decode().split())

    def grids(self) -> list[int]:
        """The blocks of each launch since the last call."""
        blocks = (ctypes.c_uint * 64)()
        count = self._library.host_grids(blocks, len(blocks))
        return list(blocks[:count])

    def offsets(self, numbers: Sequence[int]) -> tuple[int, int]:
        """As host_offsets()."""
        at = ctypes.c_int64()
        counter = self._library.host_offsets(
            (ctypes.c_int64 * len(numbers))(*numbers), ctypes.byref(at)
        )
        return at.value, counter


def _merged(tensor: Tensor, begin: int, end: int) -> int:
    """The stride of dimensions [begin, end) taken as one."""
    inner = [tensor.stride(i) for i in range(begin, end) if tensor.size(i) > 1]
    return inner[-1] if inner else 1


@dataclass
class Call:
    """A layer call: its tensors and options, and a forced plan.

    ``residual`` and ``relu`` are the epilogue, ``addend`` is added before the norm, ``grad_sum`` is
    the gradient of that sum. The forward pass leaves ``output`` and ``sum`` here, for the backward
    pass and for :meth:`expected`.
    """

    kind: str
    input: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    num_groups: int = 0
    normalized_ndim: int = 0
    eps: float = 1e-5
    noise_train: float = 0.0
    alpha: float = 1.0
    order: int = 2
    transform_eps: float = 0.0
    seed: int = 77
    stream: int = 0
    frozen: Tensor | None = None
    noise_scale: Tensor | None = None
    columns: bool = False
    residual: Tensor | None = None
    relu: bool = False
    addend: Tensor | None = None
    grad_sum: Tensor | None = None
    output: Tensor | None = None
    sum: Tensor | None = None
    force: dict[str, Any] = field(default_factory=dict)

    @property
    def spatial(self) -> int:
        return math.prod(self.input.shape[2:])

    @property
    def geometry(self) -> tuple[int, int, int, int]:
        """outer, inner, runs, length."""
        u = self.input
        if self.kind == "layer":
            lead = u.dim() - self.normalized_ndim
            return 1, math.prod(u.shape[:lead]), 1, math.prod(u.shape[lead:])
        n, c = u.shape[:2]
        width = c // self.num_groups if self.kind == "group" else 1
        if self.columns:
            batch = self.kind == "batch"
            rows = n * self.spatial if batch else self.spatial
            return 1 if batch else n, c // width, rows, width
        if self.kind == "batch":
            return 1, c, n, self.spatial
        return n, c // width, width, self.spatial

    def strides(self, t: Tensor) -> tuple[int, int, int]:
        """outer, inner, run."""
        if self.kind == "layer":
            return 0, _merged(t, 0, t.dim() - self.normalized_ndim), 0
        sample, channel = t.stride()[:2]
        width = t.size(1) // self.num_groups if self.kind == "group" else 1
        if self.columns:
            row = _merged(t, 2, t.dim()) if self.spatial > 1 else sample
            return (0 if self.kind == "batch" else sample), width, row
        return (0, channel, sample) if self.kind == "batch" else (sample, channel * width, channel)

    @property
    def affine(self) -> str:
        if self.kind == "layer":
            return "element"
        if self.columns:
            return "column"
        return "run" if self.kind == "group" and self.input.size(1) > self.num_groups else "group"

    def _operand(self, t: Tensor | None) -> tuple[int, tuple[int, int, int]]:
        return (0, (0, 0, 0)) if t is None else (t.data_ptr(), self.strides(t))

    @property
    def normalized(self) -> Tensor:
        """The normalized tensor: the sum, where the forward pass has left one."""
        return self.input if self.addend is None or self.sum is None else self.sum

    def _problem(self, output: Tensor | None, stats: Tensor | None) -> dict[str, Any]:
        dense = torch.empty(self.input.shape, device="meta")
        if self.columns and self.input.dim() > 2:
            dense = dense.movedim(1, -1).contiguous().movedim(-1, 1)
            order = (self.input.size(0), *self.input.shape[2:], self.input.size(1))
            dense = torch.empty(order, device="meta").movedim(-1, 1)
        self._seed = torch.tensor([self.seed], dtype=torch.int64)
        nothing = (0, False)

        def parameter(p: Tensor | None) -> tuple[int, bool]:
            if p is None:
                return nothing
            return p.data_ptr(), p.dtype == self.input.dtype

        operand = self._operand
        return {
            "storage": STORAGE[self.input.dtype],
            "geometry": [int(self.columns), *self.geometry],
            "affine": AFFINE[self.affine],
            "noise": self.noise_train > 0,
            "given_scale": self.noise_scale is not None,
            "seed": self._seed.data_ptr(),
            "noise_train": self.noise_train,
            "stream": self.stream,
            "position": self.strides(dense),
            "eps": self.eps,
            "alpha": self.alpha,
            "transform_eps": self.transform_eps,
            "order": self.order,
            "frozen": self.frozen is not None,
            "stats": 0 if stats is None else stats.data_ptr(),
            "weight": parameter(self.weight),
            "bias": parameter(self.bias),
            "input": operand(self.input),
            "output": operand(output),
            "grad_output": operand(None),
            "residual": operand(None),
            "relu": self.relu,
            "activated": operand(None),
            "addend": operand(None),
            "sum": operand(None),
            "grad_sum": operand(None),
            "grad_weight": nothing,
            "grad_bias": nothing,
            "tier": TIERS[self.force.get("tier", "auto")],
            "threads": self.force.get("threads", 0),
            "blocks": self.force.get("blocks", 0),
            "thread_groups": self.force.get("thread_groups", 0),
        }

    @property
    def groups(self) -> int:
        return self.geometry[0] * self.geometry[1]

    def forward(self, launchers: Launchers) -> tuple[Tensor, Tensor]:
        output = torch.full_like(self.input, math.nan)
        stats = torch.full(
            (len(Row), self.groups), math.nan, dtype=statistics_dtype(self.input.dtype)
        )
        if self.frozen is not None:
            stats.copy_(self.frozen)
        if self.noise_scale is not None:
            stats[Row.NOISE_SCALE] = self.noise_scale
        problem = self._problem(output, stats)
        if self.residual is not None:
            problem["residual"] = self._operand(self.residual)
        if self.addend is not None:
            self.sum = torch.full_like(self.input, math.nan)
            problem["addend"] = self._operand(self.addend)
            problem["sum"] = self._operand(self.sum)
        launchers.forward(problem)
        self.output = output
        return output, stats

    def backward(
        self, launchers: Launchers, grad: Tensor, stats: Tensor, needs_input: bool = True
    ) -> tuple[Tensor | None, ...]:
        du = torch.full_like(self.input, math.nan) if needs_input else None
        dw, db = (
            None if p is None else torch.full_like(p, math.nan) for p in (self.weight, self.bias)
        )
        problem = self._problem(du, stats)
        problem["input"] = self._operand(self.normalized)
        problem["grad_output"] = self._operand(grad)
        if self.relu:
            problem["activated"] = self._operand(self.output)
        if self.grad_sum is not None and needs_input:
            problem["grad_sum"] = self._operand(self.grad_sum)
        for name, p in (("grad_weight", dw), ("grad_bias", db)):
            if p is not None:
                problem[name] = (p.data_ptr(), p.dtype == self.input.dtype)
        launchers.backward(problem)
        return du, dw, db

    def expected(self, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """(output, stats, du, dw, db) of the reference, in float64.

        With relu, the gradient passes where the kernels' output is positive.
        """
        leaf = self.normalized.double().requires_grad_()
        weight, bias = (
            None if p is None else p.double().requires_grad_() for p in (self.weight, self.bias)
        )
        z = None
        if self.noise_train > 0:
            seed = torch.tensor([self.seed])
            z = standard_normals(
                self.input.shape, seed, self.stream, self.columns and self.input.dim() > 2
            )
        output, stats = reference.normal_norm(
            leaf, weight, bias, kind=self.kind, num_groups=self.num_groups,
            normalized_ndim=self.normalized_ndim, eps=self.eps, noise_train=self.noise_train,
            alpha=self.alpha, order=self.order, transform_eps=self.transform_eps, z=z,
            noise_scale=None if self.noise_scale is None else self.noise_scale.double(),
            frozen=None if self.frozen is None else self.frozen.double(),
        )  # fmt: skip
        fused = output.detach()
        if self.residual is not None:
            fused = fused + self.residual.double()
        if self.relu:
            fused = fused.relu()
        if grad is None:
            return fused, stats
        wanted = [t for t in (leaf, weight, bias) if t is not None]
        if self.relu:
            grad = torch.where(self.output <= 0, 0.0, grad)
        got = list(torch.autograd.grad(output, wanted, grad.double()))
        du = got.pop(0)
        if self.grad_sum is not None:
            du = du + self.grad_sum.double()
        dw = got.pop(0) if weight is not None else None
        db = got.pop(0) if bias is not None else None
        return fused, stats, du, dw, db
