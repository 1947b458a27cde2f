// The parameters of one call of the CPU kernels, already checked, and the table of kernels. No torch here.
#pragma once

#include "../common/params.h"

namespace normnorm {
namespace cpu {

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// The caller's threads. run() splits [0, count) into disjoint ranges and returns when all are done.
struct ThreadPool {
  int threads = 1;
  void (*run)(int64_t count, RangeBody body, void* context) = nullptr;
};

struct Problem : PassParams {
  ThreadPool pool;
  uint64_t seed = 0;

  // Parameters and their gradients: dense, compute dtype
  const void* weight = nullptr;  // null: 1
  const void* bias = nullptr;    // null: 0
  void* grad_weight = nullptr;   // backward; null: not wanted
  void* grad_bias = nullptr;
};

// The parameters of the projected error function: dense projections, float32 or float64.
struct Projections {
  Storage storage = Storage::kFloat32;
  void* data = nullptr;
  int64_t count = 0;
  bool slopes = false;  // whether the slopes overwrite the projections
  ThreadPool pool;
};

struct Kernels {
  const char* isa;
  void (*forward)(const Problem&);
  void (*backward)(const Problem&);
  double (*projected_error)(const Projections&);  // the sum
};

// One table per instruction set this library was built with.
const Kernels* generic_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();

// The table for this machine, or for NORMNORM_CPU_ISA where that is set; throws std::invalid_argument where
// the variable names no instruction set or one that this machine or this build lacks.
const Kernels& kernels();

}  // namespace cpu
}  // namespace normnorm
