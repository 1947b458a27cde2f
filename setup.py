"""Builds the compiled kernels, normnorm/_C.abi3.so; the rest of the package is in pyproject.toml.

One library serves every Python from 3.10 and every torch from 2.10, because it uses their stable
ABIs alone. Where there is no C++ compiler, or NORMNORM_NATIVE=0, the package installs without it
and says so in one line; a compiler that fails makes the installation fail. Where there is nvcc too,
the library holds the CUDA kernels, whichever torch it is built with; docs/backends.md describes the
variables that decide about them.

A build without a library leaves the reason in normnorm/_C.txt, for ``normnorm doctor``.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones stop at pyproject.toml's license
    raise SystemExit(
        f"normnorm: the build needs setuptools 77 or newer, and this is {setuptools.__version__}: "
        "pip install 'setuptools>=77'"
    )

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"

# 2.10's stable ABI: the headers hide whatever is newer, whichever torch builds.
TORCH_TARGET = "0x020a000000000000"
# Not -ffast-math: it would flush denormals in the whole process and break compensated arithmetic.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-Wno-psabi",
]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]
AVX512 = [
    *AVX2,
    *(
        "-mavx512f",
        "-mavx512bw",
        "-mavx512cd",
        "-mavx512dq",
        "-mavx512vl",
        "-mprefer-vector-width=512",
    ),
]
X86 = platform.machine().lower() in ("x86_64", "amd64")

CUDA_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
# What torch.utils.cpp_extension understands beside numbers, for GPUs that these kernels run on.
CUDA_NAMES = {
    "Ampere": "8.0 8.6+PTX",
    "Ampere+Tegra": "8.7",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX",
    "Blackwell+Tegra": "11.0",
}
CUDA_STORAGES = ("float32", "float64", "bfloat16", "float16")


class Unbuildable(Exception):
    """What is missing to build the kernels; the package works without them."""


class Failed(Exception):
    """A compiler's first error, or what an environment variable requires and is missing."""


class Unit(NamedTuple):
    """One object of the library."""

    name: str
    source: Path
    flags: list[str]
    compiler: list[str]


def define(name: str, text: str) -> str:
    """A macro that holds a text."""
    return f"-D{name}={json.dumps(text)}"


def sources(cxx: list[str], without_cuda: str) -> list[Unit]:
    """What every library holds; ``without_cuda`` says why it has no CUDA kernels, or is empty."""
    instruction_sets = {
        "generic": ["-DNN_GENERIC"],
        **({"avx2": AVX2, "avx512": AVX512} if X86 else {}),
    }
    units = []
    for isa, flags in instruction_sets.items():
        names = [f"-DNN_KERNEL_TABLE={isa}_kernels", f'-DNN_ISA_NAME="{isa}"']
        own = [*flags, *names, "-Wno-uninitialized"]  # gcc's own intrinsics set that warning off
        units.append(Unit(f"kernels_{isa}", CSRC / "cpu/kernels.cpp", [*FLAGS, *own], cxx))
    about = [
        define("NN_BUILD_FLAGS", f"{' '.join(FLAGS)} torch {TORCH_TARGET}"),
        define("NN_WITHOUT_CUDA", without_cuda),
    ]
    for name, source, own in (
        ("dispatch", "cpu/dispatch.cpp", []),
        ("layout", "common/layout.cpp", []),
        ("checks", "common/checks.cpp", []),
        ("tensors", "binding/tensors.cpp", torch_flags()),
        ("projected", "binding/projected.cpp", torch_flags()),
        ("binding", "binding/cpu.cpp", [*torch_flags(), *about]),
    ):
        units.append(Unit(name, CSRC / source, [*FLAGS, *own], cxx))
    return units


def compiler() -> list[str]:
    command = shlex.split(os.environ.get("CXX", "")) or ["c++"]
    if not shutil.which(command[0]) and not os.environ.get("CXX"):
        command = next(([c] for c in ("g++", "clang++") if shutil.which(c)), command)
    if not shutil.which(command[0]):
        raise Unbuildable(f"no C++ compiler ('{command[0]}' not found)")
    return command


def torch_flags() -> list[str]:
    try:
        import torch
    except ImportError:
        raise Unbuildable("torch is not installed (build with --no-build-isolation)") from None
    include = Path(torch.__file__).parent / "include"
    if not (include / "torch/csrc/stable/library.h").exists():
        raise Unbuildable(f"torch {torch.__version__} has no stable ABI headers")
    return [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", "-isystem", str(include)]


def torch_libraries() -> list[str]:
    import torch

    folder = Path(torch.__file__).parent / "lib"
    # libtorch has no symbol that is needed here, but where torch has CUDA it brings libtorch_cuda,
    # in which the loader finds the one weak symbol of csrc/binding/cuda.cpp.
    keep = ["-Wl,--no-as-needed"] if sys.platform.startswith("linux") else []
    return [f"-L{folder}", *keep, "-ltorch", "-ltorch_cpu", "-lc10"]


class Cuda(NamedTuple):
    """A toolkit that can compile the CUDA kernels."""

    nvcc: str
    version: str
    include: Path
    runtime: Path  # the static library of the CUDA runtime
    architectures: list[str]

    @classmethod
    def find(cls) -> Cuda:
        """The toolkit of CUDA_HOME, of PATH, of the usual place, or of PyPI's wheels."""
        program = next((p for p in map(shutil.which, cls._places()) if p), None)
        if program is None:
            raise Unbuildable("no nvcc was found")
        program = os.path.realpath(program)
        told = run([program, "--version"])
        version = re.search(r"release (\d+\.\d+)", told)
        # nvcc may be a script that calls another: what it would run tells where its toolkit is.
        top = re.search(r"^#\$ TOP=(.*)$", run([program, "--dryrun", "-c", "x.cu"]), re.MULTILINE)
        root = Path(top[1].strip()) if top else Path(program).parent.parent
        libraries = [root / "lib64", root / "lib", *root.glob("targets/*/lib")]
        includes = [root / "include", *root.glob("targets/*/include")]
        runtime = next((f / cls._RUNTIME for f in libraries if (f / cls._RUNTIME).exists()), None)
        headers = ("cuda_runtime.h", "nv/target")  # of the runtime and of CCCL
        include = next((f for f in includes if all((f / h).exists() for h in headers)), None)
        if version is None or runtime is None or include is None:
            wanted = ", ".join((*headers, cls._RUNTIME))
            raise Unbuildable(f"the CUDA toolkit of {program} is not complete ({wanted})")
        return cls(program, version[1], include, runtime, cls._architectures(program, version[1]))

    _RUNTIME = "libcudart_static.a"

    @staticmethod
    def _places() -> list[str]:
        homes = [os.environ[v] for v in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(v)]
        wheels = [str(f) for p in sys.path for f in sorted(Path(p or ".").glob("nvidia/cu[0-9]*"))]
        return [
            *(f"{home}/bin/nvcc" for home in homes),
            "nvcc",
            *(f"{home}/bin/nvcc" for home in ("/usr/local/cuda", *wheels)),
        ]

    @staticmethod
    def _architectures(nvcc: str, version: str) -> list[str]:
        """TORCH_CUDA_ARCH_LIST, names as numbers; each is one this nvcc compiles for."""
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES
        names = asked.replace(";", " ").split()
        words = [word for name in names for word in CUDA_NAMES.get(name, name).split()]
        known = run([nvcc, "--list-gpu-code"]).split()
        for word in words:
            number = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", word)
            if number is None:
                raise Unbuildable(
                    f"TORCH_CUDA_ARCH_LIST must hold numbers such as 8.0, 9.0a or 10.0+PTX, or "
                    f"{', '.join(CUDA_NAMES)}; got '{word}'"
                )
            if int(number[1]) < 8 or f"sm_{number[1]}{number[2]}" not in known:
                raise Unbuildable(
                    f"nvcc {version} cannot compile these kernels for the architecture {word} in "
                    f"TORCH_CUDA_ARCH_LIST (they need 8.0 or newer, and it knows {' '.join(known)})"
                )
        return list(dict.fromkeys(words))

    def flags(self) -> list[str]:
        code = []
        for word in self.architectures:
            number = word.removesuffix("+PTX").replace(".", "")
            code.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if word.endswith("+PTX"):
                code.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        threads = os.environ.get("MAX_JOBS") or "0"  # in each file, of which few are long; 0: all
        recent = self.version_number() >= (12, 8)
        options = ["--compress-mode=size", f"--split-compile={threads}"] if recent else []
        words = shlex.split(os.environ.get("CXX", ""))
        host = [w for w in words if not w.startswith("-")][-1:]  # without flags and ccache
        return [
            *("-std=c++20", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden"),
            *code,
            *options,
            *(f"-ccbin={name}" for name in host),
        ]

    def version_number(self) -> tuple[int, ...]:
        return tuple(int(n) for n in self.version.split("."))

    def sources(self, cxx: list[str]) -> list[Unit]:
        """The kernels and their binding; the longest compilations first."""
        units = [
            Unit(f"cuda_{name}", CSRC / f"cuda/{name}.cu", self.flags(), [self.nvcc])
            for name in (*CUDA_STORAGES, "launch")
        ]
        about = [
            *("-isystem", str(self.include)),
            define("NN_CUDA_ARCHITECTURES", " ".join(self.architectures)),
            define("NN_CUDA_COMPILER", f"nvcc {self.version}"),
        ]
        for name, own in (
            ("cuda", torch_flags()),
            ("by_definition", torch_flags()),
            ("cuda_problem", []),
            ("cuda_about", about),
        ):
            flags = [*FLAGS, *own]
            units.append(Unit(f"binding_{name}", CSRC / f"binding/{name}.cpp", flags, cxx))
        return units

    def libraries(self) -> list[str]:
        """The runtime, linked statically and kept out of the symbols that others see."""
        return [str(self.runtime), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt", "-lpthread"]


def find_cuda() -> Cuda | str:
    """The toolkit to compile the CUDA kernels with, or why there is none."""
    wanted = os.environ.get("NORMNORM_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise Failed(f"NORMNORM_CUDA must be auto, 0 or 1; got '{wanted}'")
    if wanted == "0":
        return "NORMNORM_CUDA=0"
    if not sys.platform.startswith("linux"):
        return "the CUDA kernels are built on Linux"
    try:
        return Cuda.find()
    except Unbuildable as reason:
        if wanted == "1":
            raise Failed(f"the CUDA kernels were required: {reason}") from None
        return str(reason)


# gcc's, clang's, nvcc's, ptxas's and the linker's; names of files hold the word error too.
ERROR = re.compile(r"\b(error|fatal) *:|\berror #|undefined reference|cannot find -l")


def run(command: list[str]) -> str:
    """What the program printed."""
    done = subprocess.run(command, capture_output=True, text=True)
    printed = done.stdout + done.stderr
    if done.returncode:
        print(f"{shlex.join(command)}\n{printed}", flush=True)
        lines = [line.strip() for line in printed.splitlines() if line.strip()]
        wrong = (line for line in lines if ERROR.search(line))
        first = next(wrong, lines[-1] if lines else f"{command[0]} exited with {done.returncode}")
        raise Failed(f"the compiler failed: {first}")
    return printed


def up_to_date(target: Path, command: list[str]) -> bool:
    """Whether the target was made by this command from files that have not changed since."""
    depends, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (
        target.exists() and depends.exists() and stamp.exists()
    ) or stamp.read_text() != shlex.join(command):
        return False
    # gcc writes "target: sources", nvcc "target : sources"
    words = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
    made = target.stat().st_mtime
    return all(os.path.exists(w) and os.path.getmtime(w) <= made for w in words)


def compile_object(unit: Unit, folder: Path) -> Path:
    target = folder / f"{unit.name}.o"
    own = [] if unit.source.suffix == ".cu" else shlex.split(os.environ.get("CXXFLAGS", ""))
    depends = ["-MD", "-MF"] if unit.source.suffix == ".cu" else ["-MMD", "-MF"]
    command = [*unit.compiler, *unit.flags, *own, *depends, str(target.with_suffix(".d")),
               "-c", str(unit.source), "-o", str(target)]  # fmt: skip
    if not up_to_date(target, command):
        run(command)
        target.with_suffix(".cmd").write_text(shlex.join(command))
    return target


class BuildKernels(build_ext):
    """Compiles each file of csrc with its own flags, again only where something changed."""

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        library = root / "normnorm/_C.abi3.so"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        without = library.with_name("_C.txt")  # why there is no library
        without.unlink(missing_ok=True)
        try:
            try:
                if os.environ.get("NORMNORM_NATIVE") == "0":
                    raise Unbuildable("NORMNORM_NATIVE=0")
                self.build_library(library)
            except Unbuildable as reason:
                if os.environ.get("NORMNORM_NATIVE") == "1":
                    raise Failed(f"the compiled kernels were required: {reason}") from None
                without.write_text(f"left out: {reason}\n", encoding="utf-8")
                print(
                    f"normnorm: installed without compiled kernels, in plain PyTorch: {reason}",
                    flush=True,
                )
        except Failed as failure:
            without.write_text(f"failed: {failure}\n", encoding="utf-8")
            raise SystemExit(
                f"normnorm: {failure} (NORMNORM_CUDA=0 leaves out the CUDA kernels, "
                "NORMNORM_NATIVE=0 all compiled ones)"
            ) from None

    def build_library(self, target: Path) -> None:
        cuda = find_cuda()
        if isinstance(cuda, Cuda):
            self.build_with(cuda, "", target)
        else:
            self.build_with(None, cuda, target)
            if cuda != "NORMNORM_CUDA=0":
                print(f"normnorm: built for the CPU alone: {cuda}", flush=True)

    def build_with(self, cuda: Cuda | None, without_cuda: str, target: Path) -> None:
        cxx = compiler()
        folder = Path(self.build_temp).resolve() / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        units = [*(cuda.sources(cxx) if cuda else []), *sources(cxx, without_cuda)]
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            compiling = [pool.submit(compile_object, unit, folder) for unit in units]
            try:
                for compiled in as_completed(compiling):
                    compiled.result()
            except Failed:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        objects = [str(compiled.result()) for compiled in compiling]
        strip = ["-Wl,-s"] if sys.platform.startswith("linux") else []
        libraries = [*torch_libraries(), *(cuda.libraries() if cuda else [])]
        run([*cxx, "-shared", *objects, *libraries, *strip, "-o", str(target)])
        what = platform.machine()
        if cuda:
            what += f" and for CUDA {' '.join(cuda.architectures)} (nvcc {cuda.version})"
        print(f"normnorm: compiled kernels for {what} built into {target.name}", flush=True)

    def get_outputs(self) -> list[str]:
        made = (Path(self.build_lib) / "normnorm").glob("_C.*")
        return [] if self.inplace else [str(path) for path in made]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # in place nothing is built elsewhere and copied


setup(
    ext_modules=[Extension("normnorm._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
