"""The CPU kernels, without torch, under AddressSanitizer, UndefinedBehaviorSanitizer and
ThreadSanitizer; and their sources through a compiler for another processor."""

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


def table(isa: str) -> list[str]:
    names = [f"-DNN_KERNEL_TABLE={isa}_kernels", f'-DNN_ISA_NAME="{isa}"']
    return [*names, *(["-DNN_GENERIC"] if isa == "generic" else []), *FLAGS[isa]]


def build(folder: Path, isa: str, flags: list[str]) -> Path:
    """The driver with the kernels of one instruction set; the others' tables are empty."""
    common = [CXX, "-std=c++17", "-O1", "-g1", "-fno-math-errno", "-fno-trapping-math"]
    common += ["-Wno-psabi", *flags]
    missing = folder / "missing.cpp"
    x86 = platform.machine() in ("x86_64", "AMD64")
    absent = [other for other in FLAGS if other != isa and (x86 or other == "generic")]
    missing.write_text(
        f'#include "{CPU / "params.h"}"\nnamespace normnorm::cpu {{\n'
        + "".join(f"const Kernels* {name}_kernels() {{ return nullptr; }}\n" for name in absent)
        + "}\n"
    )
    kernels, program = str(folder / "kernels.o"), folder / "driver"
    compile_kernels = [*common, *table(isa), "-c", str(CPU / "kernels.cpp"), "-o", kernels]
    subprocess.run(compile_kernels, check=True)
    sources = map(str, [*SOURCES, missing])
    subprocess.run([*common, *sources, kernels, "-lpthread", "-o", str(program)], check=True)
    return program


def run(program: Path, threads: int, isa: str) -> str:
    environment = {**os.environ, "NORMNORM_CPU_ISA": isa}
    command = [str(program), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def supported(flags: list[str], folder: Path) -> bool:
    source = folder / "empty.cpp"
    source.write_text("int main() { return 0; }\n")
    program = folder / "empty"
    linked = subprocess.run([CXX, *flags, str(source), "-o", str(program)], capture_output=True)
    return linked.returncode == 0 and subprocess.run([str(program)]).returncode == 0


@pytest.mark.parametrize(
    ("sanitizers", "isa"),
    [
        ("address,undefined", "generic"),
        *(
            pytest.param("address,undefined", isa, marks=pytest.mark.slow)
            for isa in FLAGS if isa != "generic"
        ),
        pytest.param("thread", "generic", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_kernels_stay_in_their_memory_in_defined_behaviour_without_races(sanitizers, isa, tmp_path):
    if isa not in runnable():
        pytest.skip(f"this processor has no {isa}: its kernels did not run under the sanitizers")
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if not supported(flags, tmp_path):
        pytest.skip(f"this compiler cannot sanitize {sanitizers}")
    program = build(tmp_path, isa, flags)
    alone = run(program, 1, isa)
    assert len(alone.splitlines()) > 30
    assert run(program, 3, isa) == alone


def test_sources_compile_for_another_processor():
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here: the sources were not compiled for it")
    for source in (CPU / "kernels.cpp", CPU / "dispatch.cpp", ROOT / "csrc/common/layout.cpp"):
        command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
        subprocess.run([*command, *table("generic"), str(source)], check=True)
