"""Compiles the programs of a check on a GPU into ``build/gpu``, with or without a GPU.

    python tests/cuda/gpu/build.py [--arch 9.0] [--install]

The folder holds the extension (stable ABI: any Python and any torch from 2.10 load it), the
launchers that take a forced plan (``launchers.cpp``), the program for compute-sanitizer
(``sanitized.cpp``) with its problems, and a hash of the sources, without a change of which nothing
is compiled. ``--install`` copies the extension into the package.
"""

from __future__ import annotations

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
LAUNCHERS = HERE.parent / "host_cuda/launchers.cpp"
LIBRARY = "_C.abi3.so"
PROBLEMS = "problems.txt"
MADE = (LIBRARY, "launchers.so", "sanitized", PROBLEMS)


def made_of(arch: str) -> dict[str, Any]:
    """What the build depends on beside the compiler: sources and target."""
    digest = hashlib.sha256()
    kept = [*(ROOT / "csrc").rglob("*"), ROOT / "setup.py", *HERE.glob("*.cpp"), HERE / "build.py"]
    host = ROOT / "tests/cuda/host_cuda"
    kept += [*host.glob("*.py"), *host.glob("launchers.cpp")]
    for path in sorted(p for p in kept if p.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes())
    return {
        "digest": digest.hexdigest(), "architecture": arch, "machine": platform.machine(),
    }  # fmt: skip


def run(command: list[str], **variables: str) -> str:
    """The program's output; exits if it fails."""
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True
    )
    if done.returncode:
        print(f"{shlex.join(command)}\n{done.stdout}{done.stderr}")
        sys.exit(f"gpu build: {Path(command[0]).name} failed; its words are above")
    return done.stdout


def build(arch: str) -> dict[str, Any]:
    """Compiles everything; returns what it was made of."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    library = OBJECTS / "lib"
    run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(library), "--build-temp",
         str(OBJECTS)],
        NORMNORM_NATIVE="1", NORMNORM_CUDA="1", TORCH_CUDA_ARCH_LIST=arch,
    )  # fmt: skip
    shutil.copy(library / "normnorm" / LIBRARY, FOLDER)
    objects = OBJECTS / "objects"
    kernels = sorted(map(str, objects.glob("cuda_*.o")))
    (nvcc,) = re.findall(r"^nvcc = (.*)$", (objects / "build.ninja").read_text(), re.MULTILINE)
    # nvcc links, because it finds its runtime.
    link = [nvcc, "-std=c++20", "-O1", "-cudart", "static", *kernels, str(LAUNCHERS)]
    hidden = ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "--exclude-libs,ALL,-s"]
    run([*link, "-shared", *hidden, "-o", str(FOLDER / "launchers.so")])
    run([*link, str(HERE / "sanitized.cpp"), "-Xlinker", "-s", "-o", str(FOLDER / "sanitized")])
    said = run([nvcc, "--version"]).splitlines()
    return {**made_of(arch), "nvcc": next((line for line in said if "release" in line), "")}


def build_for_the_cpu() -> None:
    """The programs of a dry run: the kernels on the CPU, their ops, the sanitizers' program."""
    from host_cuda import harness, torch_library

    ON_CPU.mkdir(parents=True, exist_ok=True)
    harness.build()
    torch_library.build()
    program = ON_CPU / "sanitized"
    words = [*harness.flags(), "-DNN_ON_CPU", str(LAUNCHERS), str(HERE / "sanitized.cpp")]
    run(["g++", *words, *map(str, harness.kernel_objects()), "-lpthread", "-o", str(program)])


def write_problems(path: Path) -> None:
    """Writes the launchers' arguments for small layers in every tier, with buffers in place of
    tensors."""
    import torch
    from host_cuda import cases, harness

    torch.manual_seed(20260105)
    words: list[object] = []
    plans = [
        (cases.ROWS[case], plan, False)
        for case in ("layer", "layer-ragged", "batch-ragged", "group-ragged")
        for plan in cases.ROW_TIERS.values()
    ]
    plans += [
        (cases.COLUMNS[case], plan, True)
        for case in ("batch-ragged", "instance")
        for plan in cases.COLUMN_TIERS.values()
    ]
    plans.append((cases.COLUMNS["group"], cases.COLUMN_TIERS["streaming"], True))
    for case, plan, columns in plans:
        for dtype in (torch.float32, torch.bfloat16):
            call, grad = cases.make(case, dtype, columns, noise_train=0.7, force=plan)
            call = cases.fuse(call, cases.FUSIONS["both"])
            given = [call.input, call.weight, call.bias, call.residual, call.addend]
            given += [call.grad_sum, grad]
            passes: list[dict[str, Any]] = []
            recorded = {"forward": passes.append, "backward": passes.append}
            module: Any = type("Recorder", (), recorded)
            output, stats = call.forward(module)
            written = [output, call.sum, stats, *call.backward(module, grad, stats)]
            buffers = {t.data_ptr(): i for i, t in enumerate([*given, *written]) if t is not None}
            words += ["case", len(buffers)]
            for i, tensor in enumerate(t for t in [*given, *written] if t is not None):
                words += [harness.STORAGE[tensor.dtype], tensor.numel(), int(i < len(given))]
            for backward, problem in enumerate(passes):
                numbers, reals, pointers = harness.arrays({**problem, "seed": 0})
                places = [buffers.get(pointer, -1) for pointer in pointers]
                for part in (numbers, reals, places):
                    words += [len(part), *part]
                assert backward in (0, 1)
    path.write_text(" ".join(map(str, words)) + "\n", encoding="utf-8")


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
        write_problems(ON_CPU / PROBLEMS)
        return 0
    fits = {name: stored.get(name) for name in made_of("")} == made_of(options.arch)
    fits = fits and all((FOLDER / name).exists() for name in MADE)
    if fits and options.install:
        fits = not install()  # compiled with newer libraries, for example
    if not fits:
        stored = build(options.arch)
        write_problems(FOLDER / PROBLEMS)
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
