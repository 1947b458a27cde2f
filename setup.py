"""Builds the compiled kernels, normnorm/_C.abi3.so, with ninja; pyproject.toml has the rest.

It uses stable ABIs only: one file serves Python 3.10, torch 2.10 and whatever is newer. Without a
C++ compiler, or with NORMNORM_NATIVE=0, the package installs without it and normnorm/_C.txt has the
reason; a compiler that fails makes the installation fail. With NORMNORM_CUDA=1 it holds the CUDA
kernels too, whichever torch it is built with. docs/internals/backends.md has all variables.
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import threading
from os import environ
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

if int(setuptools.__version__.split(".")[0]) < 77:  # older ones reject pyproject.toml's license
    raise SystemExit(f"normnorm needs setuptools 77 or newer, and this is {setuptools.__version__}")

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
WITHOUT_CUDA = "NORMNORM_CUDA=1 was not set"
LINUX = sys.platform.startswith("linux")
CUDA_ARCHITECTURES = "8.0 9.0 10.0 12.0+PTX"
# Names that torch accepts in TORCH_CUDA_ARCH_LIST, where these kernels run.
CUDA_NAMES = {
    "Ampere": "8.0 8.6+PTX", "Ampere+Tegra": "8.7", "Ada": "8.9+PTX", "Hopper": "9.0+PTX",
    "Blackwell": "10.0 10.3 12.0 12.1+PTX", "Blackwell+Tegra": "11.0",
}  # fmt: skip
# Of gcc, clang, nvcc, ptxas, ninja and the linker; file names contain the word error too.
ERROR = re.compile(r"\b(error|fatal) *:|\berror #|undefined reference|cannot find -l")


class Missing(Exception):
    """Something the CPU kernels need that is not here; the package works without the library."""


class Failed(Exception):
    """A compiler's first error, or the requirement of a variable that cannot be met."""


def report_time(ended: threading.Event) -> None:
    """ninja prints a line when a job has ended, and a job can take minutes."""
    seconds = 0
    while not ended.wait(10):
        print(f"compiling for {(seconds := seconds + 10)} s", flush=True)


def run(*command: str, echo: bool = False) -> str:
    """Its output, printed as it comes with ``echo``; Failed with the first failed job's error."""
    lines, pipe, ended = [], subprocess.PIPE, threading.Event()
    if echo:
        threading.Thread(target=report_time, args=[ended], daemon=True).start()
    with subprocess.Popen(command, text=True, stdout=pipe, stderr=subprocess.STDOUT) as process:
        for line in process.stdout:
            lines.append(line.strip())
            if echo:
                print(line, end="", flush=True)
    ended.set()
    if process.returncode:
        start = next((i + 2 for i, line in enumerate(lines) if line.startswith("FAILED:")), 0)
        said = [line for line in lines[start:] if line and not line.startswith(("ninja: ", "["))]
        last = (said or [f"{command[0]} exited with {process.returncode}"])[-1]
        raise Failed(f"the compiler failed: {next(filter(ERROR.search, said), last)}")
    return "\n".join(lines)


def find_compiler() -> list[str]:
    asked = shlex.split(environ.get("CXX", ""))
    for command in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    raise Missing(f"no C++ compiler ('{(asked or ['c++'])[0]}' not found)")


class Cuda:
    """The toolkit of CUDA_HOME or CUDA_PATH, of PATH, of /usr/local/cuda, or of a PyPI package."""

    def __init__(self) -> None:
        found = next(filter(None, map(shutil.which, self.places())), None)
        if found is None or not LINUX:
            raise Failed("no nvcc was found" if LINUX else "the CUDA kernels are built on Linux")
        self.nvcc = os.path.realpath(found)
        self.version = re.search(r"release (\d+\.\d+)|$", run(self.nvcc, "--version"))[1]
        asked = (environ.get("TORCH_CUDA_ARCH_LIST") or CUDA_ARCHITECTURES).replace(";", " ")
        words = " ".join(CUDA_NAMES.get(word, word) for word in asked.split())
        self.architectures = list(dict.fromkeys(words.split()))
        # An empty library: the headers of CCCL and the runtime, its library, the architectures.
        probe = "-shared -cudart static -Xcompiler -fPIC -include nv/target -x cu /dev/null -o"
        try:
            run(self.nvcc, *self.flags(), *probe.split(), os.devnull)
        except Failed as failure:
            raise Failed(f"{self.nvcc} (CUDA {self.version}) cannot compile for the architectures "
                         f"{asked} of TORCH_CUDA_ARCH_LIST: {failure}") from None  # fmt: skip

    @staticmethod
    def places() -> list[str]:
        homes = [f"{environ[v]}/bin/nvcc" for v in ("CUDA_HOME", "CUDA_PATH") if environ.get(v)]
        wheels = [f for p in sys.path for f in sorted(Path(p or ".").glob("nvidia/cu*/bin/nvcc"))]
        return [*homes, "nvcc", "/usr/local/cuda/bin/nvcc", *map(str, wheels)]

    def flags(self) -> list[str]:
        words = []
        for name in self.architectures:
            number = re.fullmatch(r"([89]|1\d)\.(\d[af]?)(\+PTX)?", name)
            if number is None:
                raise Failed("TORCH_CUDA_ARCH_LIST must hold numbers from 8.0 such as 9.0a or "
                             f"10.0+PTX, or {', '.join(CUDA_NAMES)}; got '{name}'")  # fmt: skip
            virtual, kinds = number[1] + number[2], ("sm", "compute") if number[3] else ("sm",)
            words += [f"-gencode=arch=compute_{virtual},code={kind}_{virtual}" for kind in kinds]
        if tuple(map(int, self.version.split("."))) >= (12, 8):
            words.append("--compress-mode=size")  # without --split-compile, whose spills vary
        host = [word for word in environ.get("CXX", "").split() if not word.startswith("-")]
        return [*words, *(f"-ccbin={name}" for name in host[-1:])]  # without ccache and options


def find_cuda() -> Cuda | None:
    """The toolkit to compile the CUDA kernels with; None where they are not wanted."""
    if (wanted := environ.get("NORMNORM_CUDA") or "0") not in ("0", "1"):
        raise Failed(f"NORMNORM_CUDA must be 0 or 1; got '{wanted}'")
    return Cuda() if wanted == "1" else None


def ninja_file(library: Path, cuda: Cuda | None) -> str:
    """csrc/build.ninja, and csrc/cuda/build.ninja with CUDA, with what they need to know."""
    torch = importlib.util.find_spec("torch")
    if torch is None:
        raise Missing("torch is not installed (build with --no-build-isolation)")
    facts = {"NN_WITHOUT_CUDA": "" if cuda else WITHOUT_CUDA}
    variables = {"torch": [str(Path(torch.origin).parent)], "cxx": find_compiler(),
                 "cxxflags": shlex.split(environ.get("CXXFLAGS", "")),
                 "strip": ["-Wl,-s"] if LINUX else []}  # fmt: skip
    rules, link = (CSRC / "build.ninja").read_text(encoding="utf-8"), "link"
    if cuda:
        facts |= {"NN_CUDA_ARCHITECTURES": " ".join(cuda.architectures),
                  "NN_CUDA_COMPILER": f"nvcc {cuda.version}"}  # fmt: skip
        variables |= {"nvcc": [cuda.nvcc], "nvccflags": cuda.flags()}
        rules, link = rules + (CSRC / "cuda/build.ninja").read_text(encoding="utf-8"), "link_cuda"
    variables["facts"] = [f"-D{name}={json.dumps(text)}" for name, text in facts.items()]
    given = [f"{n} = {shlex.join(words).replace('$', '$$')}" for n, words in variables.items()]
    csrc, target = (re.sub(r"([$ :])", r"$\1", str(path)) for path in (CSRC, library))
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    objects = re.findall(rf"^build ({'' if x86 else '(?!avx)'}\S+\.o):", rules, re.MULTILINE)
    rules += f"build {target}: {link} {' '.join(objects)}\ndefault {target}\n"
    return "\n".join([f"csrc = {csrc}", *given, rules])


class BuildKernels(build_ext):
    """Writes build.ninja and runs it: each object again only where something changed."""

    def run(self) -> None:
        root = ROOT if self.inplace else Path(self.build_lib).resolve()
        library, reason = root / "normnorm/_C.abi3.so", root / "normnorm/_C.txt"
        library.parent.mkdir(parents=True, exist_ok=True)
        library.unlink(missing_ok=True)
        reason.unlink(missing_ok=True)
        try:
            self.build(library)
        except (Missing, Failed) as why:
            failed = isinstance(why, Failed) or environ.get("NORMNORM_NATIVE") == "1"
            reason.write_text(f"{'failed' if failed else 'left out'}: {why}\n", encoding="utf-8")
            if failed:
                raise SystemExit(f"normnorm: {why} (NORMNORM_NATIVE=0 builds none)") from None
            print("normnorm: installed without compiled kernels, in plain PyTorch:", why)

    def build(self, library: Path) -> None:
        if environ.get("NORMNORM_NATIVE") == "0":
            raise Missing("NORMNORM_NATIVE=0")
        from ninja import BIN_DIR

        cuda, jobs = find_cuda(), environ.get("MAX_JOBS")
        file = Path(self.build_temp).resolve() / "objects/build.ninja"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(ninja_file(library, cuda), encoding="utf-8")
        run(f"{BIN_DIR}/ninja", "-C", str(file.parent), *([f"-j{jobs}"] if jobs else []), echo=True)
        gpu = f"and CUDA {' '.join(cuda.architectures)} (nvcc {cuda.version})" if cuda else ""
        print(f"normnorm: {library.name} built for the CPU", gpu or f"alone: {WITHOUT_CUDA}")

    def get_outputs(self) -> list[str]:
        return [] if self.inplace else [str(f) for f in Path(self.build_lib).glob("normnorm/_C.*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}  # an in-place build copies nothing


setup(
    ext_modules=[Extension("normnorm._C", sources=[], py_limited_api=True)],
    cmdclass={"build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
