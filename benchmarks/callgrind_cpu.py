"""Instructions per element of the main CPU kernels, counted by callgrind: a measure without noise.

    python benchmarks/callgrind_cpu.py [--no-save]

The kernels are compiled without torch into a small program that valgrind runs; only the calls of
the kernels are counted. valgrind knows no AVX-512, so that the counts are those of the AVX2 path
(eight lanes). Counts are not time (a division counts as an addition), but they repeat exactly:
a change of a per cent is a change of the code. Writes ``benchmarks/results/callgrind_cpu.json``.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"
FLAGS = ["-std=c++20", "-O3", "-g1", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
AVX2 = ["-mavx2", "-mfma", "-mbmi2", "-mf16c"]

PROGRAM = """
#include <valgrind/callgrind.h>
#include <cmath>
#include <vector>
#include "csrc/cpu/problem.h"
using namespace normnorm::cpu;
namespace normnorm::cpu { const Kernels* avx512_kernels() { return nullptr; } }

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
    p.noise.on = noisy, p.noise.train = 0.4, p.noise.seed = 3, p.noise.position = s;
    p.stats = stats.data(), p.weight = w.data(), p.bias = b.data();
    p.input = {x.data(), s}, p.output = {y.data(), s};
    Problem q = p;
    q.grad_output = {grad.data(), s}, q.output = {dx.data(), s};
    q.grad_weight = dw.data(), q.grad_bias = db.data();
    char label[100];
    const auto measure = [&](const char* what, auto call) {
      const char* noise = noisy ? "noise" : "quiet";
      std::snprintf(label, sizeof(label), "%s|%s|%s|%ld", name, what, noise, long(n));
      CALLGRIND_START_INSTRUMENTATION;
      CALLGRIND_ZERO_STATS;
      call();
      CALLGRIND_DUMP_STATS_AT(label);
      CALLGRIND_STOP_INSTRUMENTATION;
    };
    measure("forward", [&] { kernels().forward(p); });
    measure("backward", [&] { kernels().backward(q); });
    if (noisy || affine == Affine::kPerElement) continue;
    p.frozen = true;
    measure("eval", [&] { kernels().forward(p); });
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


def build(folder: Path) -> Path:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None or shutil.which("valgrind") is None:
        raise SystemExit("a C++ compiler and valgrind are needed")
    (folder / "program.cpp").write_text("#include <cstdio>\n" + PROGRAM)
    kernels = str(ROOT / "csrc/cpu/kernels.cpp")
    objects = []
    for isa, flags in (("generic", ["-DNN_GENERIC"]), ("avx2", AVX2)):
        target = folder / f"{isa}.o"
        names = [f"-DNN_KERNEL_TABLE={isa}_kernels", f'-DNN_ISA_NAME="{isa}"']
        command = [compiler, *FLAGS, *flags, *names, "-c", kernels, "-o", str(target)]
        subprocess.run(command, check=True)
        objects.append(str(target))
    program = folder / "program"
    sources = [str(folder / "program.cpp"), str(ROOT / "csrc/cpu/dispatch.cpp")]
    subprocess.run(
        [compiler, *FLAGS, f"-I{ROOT}", *sources, *objects, "-o", str(program)], check=True
    )
    return program


def count(folder: Path) -> list[dict[str, str | float]]:
    out = folder / "counts"
    subprocess.run(
        [
            *("valgrind", "--tool=callgrind", "--instr-atstart=no"),
            *(f"--callgrind-out-file={out}", str(build(folder))),
        ],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    rows: list[dict[str, str | float]] = []
    for path in sorted(folder.glob("counts.*"), key=lambda p: int(p.suffix[1:])):
        text = path.read_text()
        label = re.search(r"desc: Trigger: Client Request: (.*)", text)
        total = re.search(r"^(?:summary|totals): (\d+)", text, re.MULTILINE)
        if label and total:
            name, what, noise, elements = label.group(1).split("|")
            each = int(total.group(1)) / int(elements)
            rows.append({"work": f"{name}, {what}, {noise}", "instructions": round(each, 3)})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-save", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = count(Path(folder))
    if not rows:
        sys.exit("callgrind wrote no counts")
    print("| work (AVX2, float32) | instructions an element |\n|---|---|")
    for row in rows:
        print(f"| {row['work']} | {row['instructions']:.2f} |")
    if not arguments.no_save:
        RESULTS.mkdir(exist_ok=True)
        text = json.dumps(rows, indent=1) + "\n"
        (RESULTS / "callgrind_cpu.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
