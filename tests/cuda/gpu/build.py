"""Compiles the programs of a check on a GPU into ``build/gpu``, with or without a GPU.

    python tests/cuda/gpu/build.py [--arch 9.0] [--install]

The folder holds the extension (stable ABI: any Python and any torch from 2.10 load it), the program
for compute-sanitizer (``sanitized.cpp``), and a hash of the sources, without a change of which
nothing is compiled. ``--install`` copies the extension into the package.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build/gpu"
OBJECTS = ROOT / "build/gpu-objects"
ON_CPU = ROOT / "build/gpu-on-cpu"
HERE = Path(__file__).resolve().parent
LIBRARY = "_C.abi3.so"
MADE = (LIBRARY, "sanitized")


def made_of(arch: str) -> dict[str, Any]:
    """What the build depends on beside the compiler: sources and target."""
    digest = hashlib.sha256()
    kept = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", HERE / "build.py"]
    kept += [HERE / "sanitized.cpp", HERE.parent / "pass.h"]
    for path in sorted(p for p in kept if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {
        "digest": digest.hexdigest(), "architecture": arch, "machine": platform.machine(),
    }  # fmt: skip


def run(command: list[str], shown: bool = False, **variables: str) -> str:
    """The program's output, or, where it is ``shown`` as it comes, nothing; exits if it fails."""
    variables = {**os.environ, **variables}
    done = subprocess.run(command, cwd=ROOT, env=variables, capture_output=not shown, text=True)
    if done.returncode:
        print(f"{shlex.join(command)}\n{done.stdout or ''}{done.stderr or ''}")
        sys.exit(f"gpu build: {Path(command[0]).name} failed; its words are above")
    return done.stdout or ""


def build(arch: str) -> dict[str, Any]:
    """Compiles everything; returns what it was made of."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    library = OBJECTS / "lib"
    run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--build-lib", str(library),
         "--build-temp", str(OBJECTS)],
        shown=True, NORMNORM_NATIVE="1", NORMNORM_CUDA="1", TORCH_CUDA_ARCH_LIST=arch,
    )  # fmt: skip
    shutil.copy(library / "normnorm" / LIBRARY, FOLDER)
    objects = OBJECTS / "objects"
    kernels = [*objects.glob("cuda_*.o"), objects / "checks.o", objects / "layout.o"]
    (nvcc,) = re.findall(r"^nvcc = (.*)$", (objects / "build.ninja").read_text(), re.MULTILINE)
    # nvcc links, because it finds its runtime.
    link = [nvcc, "-std=c++20", "-O1", "-cudart", "static", "-Xlinker", "-s", *map(str, kernels)]
    run([*link, str(HERE / "sanitized.cpp"), "-o", str(FOLDER / "sanitized")])
    said = run([nvcc, "--version"]).splitlines()
    return {**made_of(arch), "nvcc": next((line for line in said if "release" in line), "")}


def build_for_the_cpu() -> None:
    """The programs of a dry run: the kernels on the CPU, their ops, the sanitizers' program."""
    from host_cuda import torch_library

    ON_CPU.mkdir(parents=True, exist_ok=True)
    torch_library.build()
    names = ("binding/cuda_problem", "common/checks", "common/layout")
    parts = [HERE / "sanitized.cpp", *(ROOT / f"csrc/{name}.cpp" for name in names)]
    words = [*torch_library.flags(), "-DNN_ON_CPU", *map(str, parts)]
    kernels = map(str, torch_library.kernel_objects())
    run(["g++", *words, *kernels, "-lpthread", "-o", str(ON_CPU / "sanitized")])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="9.0", help="as in TORCH_CUDA_ARCH_LIST (default 9.0)")
    parser.add_argument("--install", action="store_true", help="copy the extension into normnorm/")
    parser.add_argument("--cpu", action="store_true", help="only what a dry run needs")
    options = parser.parse_args()
    manifest = FOLDER / "made_of.json"
    stored = json.loads(manifest.read_text()) if manifest.exists() else {}
    if options.cpu:
        build_for_the_cpu()
        return 0
    fits = {name: stored.get(name) for name in made_of("")} == made_of(options.arch)
    fits = fits and all((FOLDER / name).exists() for name in MADE)
    if fits and options.install:
        fits = not install()  # compiled with newer libraries, for example
    if not fits:
        stored = build(options.arch)
        manifest.write_text(json.dumps(stored, indent=1) + "\n")
    size = sum((FOLDER / name).stat().st_size for name in MADE)
    was = "built" if not fits else "of these sources"
    print(f"build/gpu: {was}, sm {options.arch}, {size / 1e6:.1f} MB, {stored['nvcc']}")
    if options.install and (reason := install()):
        sys.exit(f"gpu build: the extension does not serve here: {reason}")
    return 0


def install() -> str:
    """Copies the extension into the package; returns why it does not load, or nothing."""
    partial = ROOT / "normnorm" / f".{LIBRARY}.partial"
    shutil.copy(FOLDER / LIBRARY, partial)
    os.replace(
        partial, ROOT / "normnorm" / LIBRARY
    )  # a process that has it loaded keeps the old one
    (ROOT / "normnorm/_C.txt").unlink(missing_ok=True)  # why an earlier build left none
    program = "import sys; from normnorm.backends import cuda; sys.exit(cuda.missing())"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    return done.stderr.strip() if done.returncode else ""


if __name__ == "__main__":
    sys.path[0] = str(HERE.parent)
    sys.path.insert(1, str(ROOT))
    sys.exit(main())
