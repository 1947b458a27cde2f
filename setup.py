"""Builds the compiled kernels, normnorm/_C.abi3.so; the rest of the package is in pyproject.toml.

One library serves every Python from 3.10 and every torch from 2.10, because it uses their stable
ABIs alone. Where there is no C++ compiler, or NORMNORM_NATIVE=0, the package installs without it
and says so in one line.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

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


class Unbuildable(Exception):
    """Why the kernels cannot be built here; the package works without them."""


def sources() -> list[tuple[str, Path, list[str]]]:
    """(object name, source, own flags) of every object in the library."""
    instruction_sets = {
        "generic": ["-DNN_GENERIC"],
        **({"avx2": AVX2, "avx512": AVX512} if X86 else {}),
    }
    kernels = []
    for isa, flags in instruction_sets.items():
        names = [f"-DNN_KERNEL_TABLE={isa}_kernels", f'-DNN_ISA_NAME="{isa}"']
        own = [*flags, *names, "-Wno-uninitialized"]  # gcc's own intrinsics set that warning off
        kernels.append((f"kernels_{isa}", CSRC / "cpu/kernels.cpp", own))
    build_flags = " ".join(FLAGS) + f" torch {TORCH_TARGET}"
    plain = [
        ("dispatch", CSRC / "cpu/dispatch.cpp", []),
        ("layout", CSRC / "cpu/layout.cpp", []),
        ("arguments", CSRC / "arguments.cpp", []),
        ("tensors", CSRC / "binding/tensors.cpp", torch_flags()),
        (
            "binding",
            CSRC / "binding/cpu.cpp",
            [*torch_flags(), f'-DNN_BUILD_FLAGS="{build_flags}"'],
        ),
    ]
    return kernels + plain


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
    return [f"-L{folder}", "-ltorch", "-ltorch_cpu", "-lc10"]


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Unbuildable(f"the compiler failed:\n{shlex.join(command)}\n{done.stderr}")


def up_to_date(target: Path, command: list[str]) -> bool:
    """Whether the target was made by this command from files that have not changed since."""
    depends, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
    if not (
        target.exists() and depends.exists() and stamp.exists()
    ) or stamp.read_text() != shlex.join(command):
        return False
    words = depends.read_text().replace("\\\n", " ").split()[1:]
    made = target.stat().st_mtime
    return all(os.path.exists(w) and os.path.getmtime(w) <= made for w in words)


def compile_object(item: tuple[str, Path, list[str]], folder: Path, cxx: list[str]) -> Path:
    name, source, flags = item
    target = folder / f"{name}.o"
    command = [*cxx, *FLAGS, *flags, *shlex.split(os.environ.get("CXXFLAGS", "")), "-MMD", "-MF",
               str(target.with_suffix(".d")), "-c", str(source), "-o", str(target)]  # fmt: skip
    if not up_to_date(target, command):
        run(command)
        target.with_suffix(".cmd").write_text(shlex.join(command))
    return target


class BuildKernels(build_ext):
    """Compiles each file of csrc with its own flags, again only where something changed."""

    def build_extension(self, extension: Extension) -> None:
        try:
            if os.environ.get("NORMNORM_NATIVE") == "0":
                raise Unbuildable("NORMNORM_NATIVE=0")
            self.build_library(Path(self.get_ext_fullpath(extension.name)))
        except Unbuildable as reason:
            if os.environ.get("NORMNORM_NATIVE") == "1":
                raise SystemExit(
                    f"normnorm: the compiled kernels were required: {reason}"
                ) from None
            first, *rest = str(reason).splitlines()
            print(
                f"normnorm: installed without compiled kernels, in plain PyTorch: {first}",
                flush=True,
            )
            if rest:
                print("\n".join(rest), file=sys.stderr)

    def build_library(self, target: Path) -> None:
        cxx = compiler()
        folder = Path(self.build_temp).resolve() / "objects"
        folder.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        jobs = int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count() or 1
        with ThreadPoolExecutor(jobs) as pool:
            objects = list(pool.map(lambda item: compile_object(item, folder, cxx), sources()))
        strip = ["-Wl,-s"] if sys.platform.startswith("linux") else []
        run([*cxx, "-shared", *map(str, objects), *torch_libraries(), *strip, "-o", str(target)])
        print(
            f"normnorm: compiled kernels for {platform.machine()} built into {target.name}",
            flush=True,
        )

    def get_ext_filename(self, name: str) -> str:
        return os.path.join(*name.split(".")) + ".abi3.so"

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if os.path.exists(path)]

    def copy_extensions_to_source(self) -> None:
        extension = self.extensions[0]
        if os.path.exists(os.path.join(self.build_lib, self.get_ext_filename(extension.name))):
            super().copy_extensions_to_source()


setup(
    ext_modules=[Extension("normnorm._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
