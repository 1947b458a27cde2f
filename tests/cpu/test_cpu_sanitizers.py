"""The CPU kernels, without torch, under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer; and their sources through a compiler for another processor."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
from test_core_math import CXX, FLAGS, runnable

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc/cpu"
SOURCES = [CPU / "dispatch.cpp", ROOT / "tests/cpu/cpu_driver.cpp"]
pytestmark = pytest.mark.skipif(CXX is None, reason="no C++ compiler on this machine")

ADDRESS = [
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"),
]
THREAD = ["-fsanitize=thread"]
ISAS = [isa for isa in FLAGS if isa != "generic"]


def table(isa: str) -> list[str]:
    names = [f"-DNN_KERNEL_TABLE={isa}_kernels", f'-DNN_ISA_NAME="{isa}"']
    return [*names, *(["-DNN_GENERIC"] if isa == "generic" else []), *FLAGS[isa]]


def build(folder: Path, isas: list[str], flags: list[str]) -> Path:
    """The driver with the kernels of some instruction sets; the others' tables are empty."""
    common = [CXX, "-std=c++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math"]
    common += ["-Wno-psabi", *flags]
    missing = folder / "missing.cpp"
    x86 = platform.machine() in ("x86_64", "AMD64")
    absent = [isa for isa in FLAGS if isa not in isas and (x86 or isa == "generic")]
    missing.write_text(
        f'#include "{CPU / "params.h"}"\nnamespace normnorm::cpu {{\n'
        + "".join(f"const Kernels* {isa}_kernels() {{ return nullptr; }}\n" for isa in absent)
        + "}\n"
    )
    jobs = []
    for isa in isas:
        target = folder / f"kernels_{isa}.o"
        command = [*common, *table(isa), "-c", str(CPU / "kernels.cpp"), "-o", str(target)]
        jobs.append((subprocess.Popen(command), target))
    for job, target in jobs:
        assert job.wait() == 0, f"{target.name} did not compile"
    program = folder / "driver"
    objects = [str(target) for _, target in jobs]
    subprocess.run(
        [*common, *map(str, [*SOURCES, missing]), *objects, "-lpthread", "-o", str(program)],
        check=True,
    )
    return program


def run(program: Path, threads: int, isa: str) -> str:
    done = subprocess.run(
        [str(program), str(threads)],
        capture_output=True,
        text=True,
        env={**os.environ, "NORMNORM_CPU_ISA": isa},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def supported(flags: list[str], folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    program = folder / "empty"
    linked = subprocess.run([CXX, *flags, str(source), "-o", str(program)], capture_output=True)
    return linked.returncode == 0 and subprocess.run([str(program)]).returncode == 0


@pytest.mark.parametrize(
    "isa", ["generic", *(pytest.param(i, marks=pytest.mark.slow) for i in ISAS)]
)
def test_kernels_stay_in_their_memory_and_in_defined_behaviour(isa, tmp_path):
    if isa not in runnable():
        pytest.skip(f"this processor has no {isa}: its kernels did not run under the sanitizers")
    if not supported(ADDRESS, tmp_path):
        pytest.skip("this compiler has no AddressSanitizer")
    program = build(tmp_path, sorted({"generic", isa}), ADDRESS)
    alone = run(program, 1, isa)
    assert len(alone.splitlines()) > 30
    assert run(program, 3, isa) == alone


@pytest.mark.slow
def test_threads_do_not_race(tmp_path):
    if not supported(THREAD, tmp_path):
        pytest.skip("this compiler has no ThreadSanitizer")
    program = build(tmp_path, ["generic"], THREAD)
    assert run(program, 4, "generic") == run(program, 1, "generic")


@pytest.mark.parametrize("processor", ["aarch64"])
def test_sources_compile_for_another_processor(processor):
    compiler = shutil.which(f"{processor}-linux-gnu-g++")
    if compiler is None:
        pytest.skip(f"no {processor}-linux-gnu-g++ here: the sources were not compiled for it")
    for source in (CPU / "kernels.cpp", CPU / "dispatch.cpp", ROOT / "csrc/common/layout.cpp"):
        command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
        subprocess.run([*command, *table("generic"), str(source)], check=True)
