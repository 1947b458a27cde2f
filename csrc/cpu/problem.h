// The parameters of one call of the CPU kernels: pointers, strides and numbers, already checked. No torch here.
#pragma once

#include <stdint.h>

namespace normnorm {
namespace cpu {

enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };

// Strides, in elements, of the canonical axes; the innermost axis always has stride 1.
struct Strides {
  int64_t outer = 0, inner = 0, run = 0;
};

struct Operand {
  void* data = nullptr;
  Strides stride;
};

// Every layer normalizes outer x inner groups of runs x length elements each. In the rows layout a run is
// contiguous in memory:
//
//   kind      outer   inner     runs   length
//   batch     1       C         N      spatial
//   layer     1       samples   1      normalized elements
//   instance  N       C         1      spatial
//   group     N       G         C/G    spatial
//
// In the columns layout (channels_last, or no spatial dimensions) the tensor is a matrix: runs counts its rows,
// and a group is `length` neighbouring columns of it, 1 for batch and instance, C/G for group; stride.inner
// equals length.
struct Geometry {
  bool columns = false;
  int64_t outer = 1, inner = 0, runs = 1, length = 0;

  int64_t groups() const { return outer * inner; }
  int64_t group_size() const { return runs * length; }
};

// What a weight belongs to: a group of a rows walk, a run of a group, an element of a group, or a matrix
// column.
enum class Affine { kPerGroup, kPerRun, kPerElement, kPerColumn };

struct Noise {
  bool on = false;
  bool given_scale = false;  // the statistics already hold s
  double train = 0;          // the factor of s z
  uint64_t seed = 0;
  uint32_t stream = 0;
  Strides position;  // where an element lies in the order in which the walk counts
  // The canonical order of the noise is that order with its last two axes (rows, cols) exchanged.
  bool transposed = false;
  int64_t rows = 1, cols = 1;
};

using RangeBody = void (*)(void* context, int64_t begin, int64_t end);

// The caller's threads. run() covers [0, count) by disjoint ranges and returns when all are done.
struct ThreadPool {
  int threads = 1;
  void (*run)(int64_t count, RangeBody body, void* context) = nullptr;
};

// What a pass joins to itself, tensors of the input's shape; null data where there is nothing to join.
struct Joined {
  Operand residual;   // forward: added to the output, before the activation
  bool relu = false;  // forward: the output's; backward: the gradient passes where `activated` is positive
  Operand activated;  // backward, with relu: the forward's output
  Operand addend;     // forward: added to the input before all else; what is normalized is their sum,
  Operand sum;        //   rounded as it is written here
  Operand grad_sum;   // backward: added to the gradient of the input
};

struct Problem : Joined {
  Storage storage = Storage::kFloat32;
  Geometry geometry;
  Affine affine = Affine::kPerGroup;
  Noise noise;
  ThreadPool pool;
  double eps = 1e-5, alpha = 1, transform_eps = 0;
  int order = 2;
  bool frozen = false;           // the statistics are given (running ones), not those of the input
  void* stats = nullptr;         // (kStatRows, groups), compute dtype
  const void* weight = nullptr;  // dense, compute dtype; null means 1
  const void* bias = nullptr;    // dense, compute dtype; null means 0
  Operand input;
  Operand output;  // forward: the output; backward: the gradient of the input (null data: not wanted)
  // backward only
  Operand grad_output;
  void* grad_weight = nullptr;  // dense, compute dtype; null: not wanted
  void* grad_bias = nullptr;
};

// What the kernel of the projected error function is given: dense projections, float32 or float64.
struct Projections {
  Storage storage = Storage::kFloat32;
  void* data = nullptr;
  int64_t count = 0;
  bool slopes = false;  // whether the slopes take the projections' place; else these stay
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
