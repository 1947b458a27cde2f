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
    objects = [str(folder / f"kernels_{isa}.o") for isa in isas]
    jobs = [
        subprocess.Popen([*common, *table(isa), "-c", str(CPU / "kernels.cpp"), "-o", target])
        for isa, target in zip(isas, objects, strict=True)
    ]
    assert [job.wait() for job in jobs] == [0] * len(isas), f"one of {isas} did not compile"
    program = folder / "driver"
    sources = map(str, [*SOURCES, missing])
    subprocess.run([*common, *sources, *objects, "-lpthread", "-o", str(program)], check=True)
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sanitizers", "isas"), [("address,undefined", tuple(FLAGS)), ("thread", ("generic",))]
)
def test_kernels_stay_in_their_memory_in_defined_behaviour_without_races(
    sanitizers, isas, tmp_path
):
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
    if not supported(flags, tmp_path):
        pytest.skip(f"this compiler cannot sanitize {sanitizers}")
    here = [isa for isa in isas if isa in runnable()]
    program = build(tmp_path, here, flags)
    for isa in here:
        alone = run(program, 1, isa)
        assert len(alone.splitlines()) > 30
        assert run(program, 3, isa) == alone
    if len(here) < len(isas):
        pytest.skip(f"passed, but this processor has {', '.join(here)} of {', '.join(isas)} alone")


def test_sources_compile_for_another_processor():
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++ here: the sources were not compiled for it")
    for source in (CPU / "kernels.cpp", CPU / "dispatch.cpp", ROOT / "csrc/common/layout.cpp"):
        command = [compiler, "-std=c++17", "-fsyntax-only", "-Wall", "-Werror", "-Wno-psabi"]
        subprocess.run([*command, *table("generic"), str(source)], check=True)
