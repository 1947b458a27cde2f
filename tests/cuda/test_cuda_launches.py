"""The launches of the host code that nvcc compiles, checked without a GPU.

``fake_cuda/runtime.cpp`` replaces the CUDA runtime. It is given the limits of a device and the
resources of each kernel, read from the machine code of an architecture, and checks each launch:
threads, registers, shared memory, clusters, blocks of cooperative launches, alignment, and that
every argument lies within its memory.
"""

import ctypes
import itertools
import math
import random
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from cuda_static import sass
from host_cuda import torch_library

from normnorm.config import KINDS

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sass.missing() is not None, reason=str(sass.missing())),
]

RUNTIME = sass.ROOT / "tests/cuda/fake_cuda/runtime.cpp"
STORAGES = ("float32", "float64", "bfloat16", "float16")  # of csrc/common/params.h, in its order
# The machine code that is read: what other static tests compile, and one type of the newest.
KNOWN = {"sm_80": ("float32",), "sm_90": STORAGES, "sm_100": ("bfloat16",), "sm_120": ("bfloat16",)}
# multiprocessors, bytes of shared memory a block and a multiprocessor, threads and blocks a
# multiprocessor, compute capability, version of the code's PTX
MODELS = {
    "sm_80": {
        "A100": (108, 166912, 167936, 2048, 32, 8, 80),
        "A100, three sevenths": (42, 166912, 167936, 2048, 32, 8, 80),
        "RTX 3090": (82, 101376, 102400, 1536, 16, 8, 80),
        "RTX 4090": (128, 101376, 102400, 1536, 24, 8, 80),
        "L4": (58, 101376, 102400, 1536, 24, 8, 80),
        "Orin": (16, 166912, 167936, 1536, 16, 8, 80),
        "three multiprocessors": (3, 101376, 102400, 1536, 16, 8, 80),
        "H100 with code for the A100": (132, 232448, 233472, 2048, 32, 9, 80),
    },
    "sm_90": {
        "H100 or H200": (132, 232448, 233472, 2048, 32, 9, 90),
        "H100 PCIe": (114, 232448, 233472, 2048, 32, 9, 90),
        "H100, one seventh": (16, 232448, 233472, 2048, 32, 9, 90),
        # clusters and little shared memory, for all storage types
        "RTX 5090, if it ran this code": (170, 101376, 102400, 1536, 24, 12, 90),
    },
    "sm_100": {"B200": (148, 232448, 233472, 2048, 32, 10, 100)},
    "sm_120": {
        "RTX 5090": (170, 101376, 102400, 1536, 24, 12, 120),
        "RTX 5060 Ti": (36, 101376, 102400, 1536, 24, 12, 120),
    },
}


class _Model(ctypes.Structure):
    """Model of runtime.cpp."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in ("id", "multiprocessors", "block_shared", "shared", "threads", "blocks")
        + ("major", "ptx")
    ]


class _Tensor(ctypes.Structure):
    """Tensor of pass.h."""

    _fields_ = [("strides", ctypes.c_int64 * 5), ("offset", ctypes.c_int64)]


_FLAGS = (
    "storage", "parameters", "backward", "channels_last", "noise", "given_scale", "frozen", "relu",
    "residual", "add", "needs_input", "needs_weight", "needs_bias", "parameter_offset", "round",
)  # fmt: skip


class _Pass(ctypes.Structure):
    """Pass of pass.h."""

    _fields_ = [
        ("kind", ctypes.c_int32),
        *((name, ctypes.c_int64) for name in ("num_groups", "normalized_ndim", "dim")),
        ("sizes", ctypes.c_int64 * 5),
        *((name, _Tensor) for name in ("input", "grad_output", "output", "beside")),
        *((name, ctypes.c_int32) for name in _FLAGS),
    ]


Known = dict[str, tuple[int, int, int]]  # a kernel's registers, shared memory, most threads


def _known(architecture: str) -> Known:
    """The resources of each kernel in an architecture's machine code."""
    found: Known = {}
    for storage in KNOWN[architecture]:
        code = sass.compile_cubin(sass.ROOT / f"csrc/cuda/{storage}.cu", architecture)
        bounds, usage = sass.launch_bounds(code), sass.resources(code)
        # since sm_90 this includes the 1 KB that the device takes
        taken = min(used["SHARED"] for used in usage.values())
        for name, used in usage.items():
            found[name] = (used["REG"], used["SHARED"] - taken, bounds[name])
    return found


def _build() -> Path:
    """The runtime, linked with the kernels' objects."""
    csrc = sass.ROOT / "csrc"
    objects = [sass.compile_cubin(s, sass.HOST) for s in sorted((csrc / "cuda").glob("*.cu"))]
    names = ("binding/cuda_problem", "common/layout", "common/checks")
    binding = [csrc / f"{name}.cpp" for name in names]
    words = [*torch_library.flags(), "-fvisibility=default", "-w"]
    folders = (csrc / "binding", csrc / "common")
    read = [RUNTIME, RUNTIME.parents[1] / "pass.h", *torch_library.sources_in(*folders)]

    def make(target: Path) -> None:
        sources = [*map(str, [RUNTIME, *binding])]
        link = ["-shared", *sources, *map(str, objects), "-Wl,-z,defs", "-lpthread"]
        torch_library.run(["g++", *words, *link, "-o", str(target)])

    state = torch_library.digest([*read, *objects], words)
    return torch_library.made(f"fake_cuda_{state}.so", make)


class Runtime:
    """The fake runtime, with one architecture's kernels on one device."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(str(_build()))
        self.library.kernel_symbol.restype = ctypes.c_char_p
        self.library.kernel_launches.restype = ctypes.c_long
        self.library.problem.restype = ctypes.c_char_p
        count = self.library.kernel_count()
        symbols = [self.library.kernel_symbol(i).decode() for i in range(count)]
        self.kernels = dict(zip(symbols, sass.demangled(symbols), strict=True))
        # The launchers cache the limits of devices below number 64, and co-residency of all.
        self.devices = itertools.count(64)

    def know(self, known: Known) -> None:
        for i, name in enumerate(self.kernels.values()):
            self.library.set_kernel(i, name.encode(), *known.get(name, (0, 0, 0)))

    def use(self, facts: tuple[int, ...]) -> None:
        self.library.set_model(ctypes.byref(_Model(next(self.devices), *facts)))

    def launches(self) -> Counter[str]:
        """The launches of each kernel so far."""
        count = self.library.kernel_launches
        return Counter({name: count(i) for i, name in enumerate(self.kernels.values())})

    def run(self, a_pass: _Pass) -> list[str]:
        """The problems of a pass."""
        error = self.library.run_pass(ctypes.byref(a_pass))
        found = [f"CUDA error {error}"] if error > 0 else []
        while (problem := self.library.problem()) is not None:
            symbol, _, what = problem.decode().partition(": ")
            found.append(f"{self.kernels.get(symbol)}: {what}")
        return found


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    return Runtime()


# --- passes, drawn -----------------------------------------------------------------------------

_SIDES = (1, 2, 3, 4, 5, 7, 8, 9, 14, 16, 28, 31, 49, 56, 64, 112, 224, 512)
_BATCHES = (1, 2, 3, 5, 8, 13, 32, 100, 256, 512)
_CHANNELS = (1, 2, 3, 4, 6, 8, 16, 17, 32, 33, 63, 64, 96, 128, 256, 512, 1000, 2048, 4096)
_ROWS = (1, 2, 3, 5, 13, 16, 100, 512, 1003, 3136, 16384, 65536, 1000000)


def _length(rng: random.Random) -> int:
    """Up to 65 million, mostly a multiple of a power of two."""
    return (rng.choice((1, 3, 5, 125)) << rng.randrange(20)) + rng.choice((0, 0, 0, 1))


def _dense(shape: list[int], order: list[int]) -> list[int]:
    """Strides of a dense tensor whose last dimension in memory is the last of an order."""
    strides, step = [0] * len(shape), 1
    for i in reversed(order):
        strides[i] = step
        step *= shape[i]
    return strides


def _tensor(strides: list[int], offset: int = 0) -> _Tensor:
    return _Tensor((ctypes.c_int64 * 5)(*strides), offset)


def draw(rng: random.Random, storages: tuple[str, ...], backward: bool) -> tuple[_Pass, str]:
    """A pass over tensors of random shapes and strides, and its description."""
    kind = rng.choice(["batch", "batch", "layer", "layer", "group", "instance"])
    if kind == "layer" and rng.random() < 0.75:
        shape = [rng.choice(_ROWS), _length(rng)]
    elif kind != "instance" and rng.random() < 0.3:
        shape = [rng.choice(_ROWS), rng.choice(_CHANNELS)]
    else:
        shape = [rng.choice(_BATCHES), rng.choice(_CHANNELS)]
        deep = rng.choice([1, 2, 2, 2, 3])
        shape += [_length(rng)] if deep == 1 else rng.choices(_SIDES, k=deep)
    if math.prod(shape) > 2**33:
        return draw(rng, storages, backward)
    rows = list(range(len(shape)))
    last = [0, *rows[2:], 1] if len(shape) > 2 else rows

    def strides(of: list[int]) -> list[int]:
        """Mostly dense; else a slice of something larger, transposed, or expanded."""
        how = rng.random()
        if how < 0.75:
            return _dense(of, rng.choice([rows, rows, last]))
        if how < 0.88:
            larger = list(of)
            larger[rng.choice(rows)] += rng.choice([1, 2, 4, 8, 16])
            return _dense(larger, rng.choice([rows, last]))
        if how < 0.95:
            return _dense(of, rng.sample(rows, len(rows)))
        return [s * rng.choice([0, 1]) for s in _dense(of, rows)]

    offset = (lambda: rng.choice([0, 1, 2, 4, 8])) if rng.random() < 0.3 else (lambda: 0)
    input = strides(shape)
    output = _dense(shape, last if input == _dense(shape, last) else rows)
    frozen = kind == "batch" and rng.random() < 0.2
    round = 0
    if kind == "batch" and not frozen and rng.random() < 0.3:
        round = rng.choice([6, 7] if backward else [1, 2, 3, 4, 5])
    add = not frozen and not round and rng.random() < 0.3
    likely: Callable[[float], bool] = lambda p: rng.random() < p  # noqa: E731
    flags = {
        "storage": STORAGES.index(rng.choice(storages)),
        "parameters": rng.choice([0, 1, 1, 2]),
        "backward": backward,
        "channels_last": output == _dense(shape, last) != _dense(shape, rows),
        "noise": likely(0.5),
        "given_scale": not round and likely(0.1),
        "frozen": frozen,
        "relu": likely(0.3),
        "residual": not add and likely(0.3),
        "add": add,
        "needs_input": likely(0.85),
        "needs_weight": likely(0.9),
        "needs_bias": likely(0.9),
        "parameter_offset": rng.choice([0, 0, 0, 1, 2]),
        "round": round,
    }
    tensors = {
        "input": _tensor(input, offset()),
        "grad_output": _tensor(input if likely(0.6) else strides(shape), offset()),
        "output": _tensor(output),
        "beside": _tensor(input if likely(0.6) else strides(shape), offset()),
    }
    groups = 0
    if kind == "group":
        groups = rng.choice([d for d in range(1, shape[1] + 1) if shape[1] % d == 0])
    drawn = _Pass(
        KINDS.index(kind), groups, rng.randrange(1, len(shape)) if kind == "layer" else 0,
        len(shape), (ctypes.c_int64 * 5)(*shape), **tensors, **flags,
    )  # fmt: skip
    laid_out = {k: (list(t.strides)[: len(shape)], t.offset) for k, t in tensors.items()}
    of = drawn.num_groups or drawn.normalized_ndim
    return drawn, f"{kind} of {of} {shape} {laid_out} {flags}"


def _problems(runtime: Runtime, architecture: str, passes: int) -> list[str]:
    """The problems of that many passes, divided among the models of an architecture."""
    rng = random.Random(architecture)
    found = []
    for name, facts in MODELS[architecture].items():
        runtime.use(facts)
        for i in range(passes // len(MODELS[architecture])):
            a_pass, words = draw(rng, KNOWN[architecture], backward=i % 2 == 1)
            found += [f"{name}, {words}: {problem}" for problem in runtime.run(a_pass)]
    return found


@pytest.mark.parametrize("architecture", MODELS)
def test_every_launch_fits_its_device(runtime, architecture):
    runtime.know(_known(architecture))
    before = runtime.launches()
    found = _problems(runtime, architecture, 48_000)
    assert not found, f"{len(found)} problems:\n" + "\n".join(found[:5])
    made = runtime.launches() - before
    assert made.total() > 100_000
    if architecture == sass.HOST:  # all its kernels are read
        kernels = set(runtime.kernels.values())
        running = {k for k in kernels if re.match("fold_running|pack_running|advance", k)}
        assert kernels - running == set(made)
