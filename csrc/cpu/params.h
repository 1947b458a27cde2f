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

// The rounds of a pass: the forward pass's, and from kSums on the backward pass's. Each reads an element once, and
// needs what the rounds before it made of the statistics. A call for one round alone computes it over a shard of a batch
// of the kind batch, and leaves its sums for the caller to add to those of the other shards.
//
//   round       sums of a group                                 statistics it needs
//   kMoments    mean, what its rounding lost, centred squares
//   kLambda     the terms of LambdaSums                         kMean, kMeanLow, kRstd
//   kMeanX      x                                               and kLmbda
//   kDeviation  |x - mean|                                      and the mean of x in kNoiseScale
//   kOutput                                                     all
//   kSums       the first five of GradientSums, the gradients   all
//               of bias and weight
//   kGradient                                                   all; the means of these five in `sums`
enum class Round { kAll, kMoments, kLambda, kMeanX, kDeviation, kOutput, kSums, kGradient };
constexpr int64_t kRoundSums[] = {0, 3, 4, 1, 1, 0, 7, 5};  // rows of Problem::sums

struct Problem : PassParams {
  ThreadPool pool;
  uint64_t seed = 0;

  Round round = Round::kAll;
  double* sums = nullptr;  // of one round, (sums, groups); null for all rounds

  // Parameters and their gradients: dense, compute dtype
  const void* weight = nullptr;  // null: 1
  const void* bias = nullptr;    // null: 0
  void* grad_weight = nullptr;   // backward; null: not wanted
  void* grad_bias = nullptr;

  // Whether the forward pass computes the noise's scale.
  bool finds_scale() const { return noise.on && !noise.given_scale; }

  // Whether a call computes a round.
  bool runs(Round which) const {
    if (round != Round::kAll) return round == which;
    switch (which) {
      case Round::kMoments:
      case Round::kLambda:
        return !frozen;
      case Round::kMeanX:
      case Round::kDeviation:
        return finds_scale();
      case Round::kGradient:
        return output.data;
      default:
        return true;
    }
  }
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
