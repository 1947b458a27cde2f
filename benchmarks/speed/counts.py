"""Instructions an element of the kernels: a measure without noise.

Counts are not time (a division counts as an addition), but they repeat exactly: a change of a per
cent is a change of the code. The CUDA kernels' counts are those of their machine code that the
tests keep. The CPU kernels are compiled without torch into a small program that valgrind runs; only
the calls of the kernels are counted. valgrind knows no AVX-512, so that the counts are those of the
AVX2 path (eight lanes).
"""

import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import get_args

from normnorm.cli import CommandError
from speed.results import Count, Mode, Operation

_ROOT = Path(__file__).resolve().parents[2]
_ISA = "avx2"
_FLAGS = ["-std=c++20", "-O3", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
_AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]

_PROGRAM = """
#include <valgrind/callgrind.h>
#include <cmath>
#include <cstdio>
#include <vector>
#include "csrc/cpu/params.h"
using namespace normnorm;
using namespace normnorm::cpu;
namespace normnorm::cpu {
const Kernels* avx512_kernels() { return nullptr; }
const Kernels* generic_kernels() { return nullptr; }
}

void count(const char* name, Geometry g, Affine affine, Strides s, int64_t parameters) {
  const int64_t n = g.groups() * g.group_size();
  std::vector<float> x(n), y(n), grad(n), dx(n), stats(8 * g.groups());
  std::vector<float> w(parameters, 1.f), b(parameters), dw(parameters), db(parameters);
  uint32_t state = 1;
  const auto uniform = [&] {
    return ((state = state * 1664525u + 1013904223u) + 1.0) / 4294967297.0;
  };
  for (int64_t i = 0; i < n; ++i) {
    x[i] = float(std::sqrt(-2 * std::log(uniform())) * std::cos(6.2831853 * uniform()));
    grad[i] = float(uniform() - 0.5);
  }
  for (int noisy = 0; noisy < 2; ++noisy) {
    Problem p;
    p.geometry = g, p.affine = affine;
    p.noise.on = noisy, p.noise.train = 0.4, p.seed = 3, p.noise.position = s;
    p.stats = stats.data(), p.weight = w.data(), p.bias = b.data();
    p.input = {x.data(), s}, p.output = {y.data(), s};
    Problem q = p;
    q.grad_output = {grad.data(), s}, q.output = {dx.data(), s};
    q.grad_weight = dw.data(), q.grad_bias = db.data();
    char label[100];
    const char* mode = noisy ? "noise" : "quiet";
    const auto measure = [&](const char* what, const char* how, auto call) {
      std::snprintf(label, sizeof(label), "%s|%s|%s|%ld", name, what, how, long(n));
      CALLGRIND_START_INSTRUMENTATION;
      CALLGRIND_ZERO_STATS;
      call();
      CALLGRIND_DUMP_STATS_AT(label);
      CALLGRIND_STOP_INSTRUMENTATION;
    };
    measure("forward", mode, [&] { kernels().forward(p); });
    measure("backward", mode, [&] { kernels().backward(q); });
    if (noisy || affine == Affine::kPerElement) continue;
    p.frozen = true;
    measure("forward", "eval", [&] { kernels().forward(p); });
  }
}

int main() {
  count("batch NCHW 8x16x56x56", {false, 1, 16, 8, 3136}, Affine::kPerGroup, {0, 3136, 50176}, 16);
  count("batch NCHW 8x64x7x7", {false, 1, 64, 8, 49}, Affine::kPerGroup, {0, 49, 3136}, 64);
  count("batch channels_last 8x64x28x28", {true, 1, 64, 6272, 1}, Affine::kPerColumn, {0, 1, 64},
        64);
  count("layer 1024x384", {false, 1, 1024, 1, 384}, Affine::kPerElement, {0, 384, 0}, 384);
  count("layer 64x4096", {false, 1, 64, 1, 4096}, Affine::kPerElement, {0, 4096, 0}, 4096);
  return 0;
}
"""


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["it said nothing"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise CommandError(f"{command[0]} failed: {first}")


def _build(folder: Path) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    needed = {"a C++ compiler": compiler, "valgrind": shutil.which("valgrind")}
    missing = [name for name, path in needed.items() if path is None]
    if compiler is None or missing:
        raise CommandError(f"counting needs {' and '.join(missing)}")
    (folder / "program.cpp").write_text(_PROGRAM, encoding="utf-8")
    kernels, program = folder / "kernels.o", folder / "program"
    names = [f"-DNN_KERNEL_TABLE={_ISA}_kernels", f'-DNN_ISA_NAME="{_ISA}"']
    source = str(_ROOT / "csrc/cpu/kernels.cpp")
    _run([compiler, *_FLAGS, *_AVX2, *names, "-c", source, "-o", str(kernels)], folder)
    sources = [str(folder / "program.cpp"), str(_ROOT / "csrc/cpu/dispatch.cpp"), str(kernels)]
    _run([compiler, *_FLAGS, f"-I{_ROOT}", *sources, "-o", str(program)], folder)
    return program


def _read(path: Path) -> Count | None:
    """One dump of callgrind's; None for those of no measurement."""
    text = path.read_text(encoding="utf-8")
    label = re.search(r"desc: Trigger: Client Request: (.*)", text)
    total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
    if not label or not total:
        return None
    work, operation, mode, elements = label.group(1).split("|")
    assert operation in get_args(Operation), operation
    assert mode in get_args(Mode), mode
    each = int(total.group(1)) / int(elements)
    return Count(work=work, mode=mode, operation=operation, isa=_ISA, instructions=round(each, 3))  # type: ignore[arg-type]


def count_cpu() -> list[Count]:
    """Compiles the kernels and counts: about a minute.

    Raises:
        CommandError: there is no valgrind or compiler, or one of them fails.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        out = folder / "counts"
        program = _build(folder)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no"]
        _run([*command, f"--callgrind-out-file={out}", str(program)], folder)
        dumps = sorted(folder.glob("counts.*"), key=lambda path: int(path.suffix[1:]))
        counts = [found for found in map(_read, dumps) if found is not None]
    if not counts:
        raise CommandError("valgrind wrote no counts")
    return counts


# How the counts are named, and which pass and mode of a layer with a weight each stands for.
_PASSES: dict[str, tuple[Operation, Mode]] = {
    "forward": ("forward", "quiet"),
    "forward_noise": ("forward", "noise"),
    "backward_weight": ("backward", "quiet"),
    "backward_noise": ("backward", "noise"),
}


def count_cuda(capability: tuple[int, int]) -> list[Count]:
    """The stored counts for an architecture, of a group that one block holds in registers; none
    for an architecture that was not counted."""
    stored = _ROOT / "tests/data/sass_budgets.json"
    by_compiler = json.loads(stored.read_text(encoding="utf-8"))
    newest = max(by_compiler, key=lambda version: tuple(map(int, version.split("."))))
    isa = f"sm_{capability[0]}{capability[1]}"
    counts = []
    for name, found in by_compiler[newest].get(isa, {}).items():
        kernel, _, dtype = name.rpartition("_")
        if kernel in _PASSES:
            operation, mode = _PASSES[kernel]
            counts.append(
                Count(
                    work=f"CUDA kernel, {dtype}, group in registers", mode=mode,
                    operation=operation, isa=isa, dtype=dtype, instructions=found["instructions"],
                )
            )  # fmt: skip
    return counts
