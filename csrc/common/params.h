// The parameters of one pass that all compiled backends share, already checked. Neither torch nor CUDA here.
#pragma once

#include <stdint.h>

#include "../math/macros.h"
#include "../math/settings.h"

namespace normnorm {

enum class Storage { kFloat32, kFloat64, kBFloat16, kFloat16 };

// With its names in the order of ACTIVATIONS in normnorm/config.py.
enum class Activation { kNone, kRelu };
constexpr const char* kActivationNames[] = {"", "relu"};

// Strides, in elements, of the axes outer, inner and run of a Geometry; the innermost axis has stride 1.
struct Strides {
  int64_t outer = 0, inner = 0, run = 0;
};

// A tensor of the input's shape.
struct Operand {
  void* data = nullptr;
  Strides stride;
};

// How the kernels see the input: outer x inner groups, each normalized over runs x length elements.
//
// In the rows layout a run is contiguous in memory:
//
//   kind      outer   inner     runs   length
//   batch     1       C         N      spatial
//   layer     1       samples   1      normalized elements
//   instance  N       C         1      spatial
//   group     N       G         C/G    spatial
//
// In the columns layout (channels_last, or no spatial dimensions) a sample, or for batch the whole tensor, is a matrix
// whose columns are channels. A run is a row of it, and a group is `length` neighbouring columns; stride.inner ==
// length:
//
//   kind      outer   inner     runs           length
//   batch     1       C         N x spatial    1
//   instance  N       C         spatial        1
//   group     N       G         spatial        C/G
struct Geometry {
  bool columns = false;
  int64_t outer = 1, inner = 0, runs = 1, length = 0;

  int64_t groups() const { return outer * inner; }
  int64_t group_size() const { return runs * length; }
};

// What one element of the weight and bias belongs to.
enum class Affine {
  kPerGroup,    // rows: batch, instance
  kPerRun,      // rows: group
  kPerElement,  // rows: layer
  kPerColumn,   // columns
};

// Where an element lies in the canonical order of the noise.
struct NoiseOrder {
  Strides position;  // an element's index, in the order of the layout
  // Whether the canonical order is that order with its last two axes (rows, cols) exchanged.
  bool transposed = false;
  int64_t rows = 1, cols = 1;
};

struct NoiseParams : NoiseOrder {
  bool on = false;
  bool given_scale = false;  // the statistics already hold s
  double train = 0;          // the factor of s z
  uint32_t stream = 0;
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
constexpr int64_t kRoundSums[] = {0, 3, 4, 1, 1, 0, 7, 5};  // rows of PassParams::sums
inline bool is_backward(Round round) { return round >= Round::kSums; }
inline bool writes_tensor(Round round) { return round == Round::kOutput || round == Round::kGradient; }

struct PassParams {
  Round round = Round::kAll;
  double* sums = nullptr;  // of one round, (sums, groups); null for all rounds

  // Layout
  Storage storage = Storage::kFloat32;
  Geometry geometry;
  Affine affine = Affine::kPerGroup;

  // Transform and estimate of lambda
  Settings<double> settings;
  bool frozen = false;  // the statistics are given (running ones), not the input's

  NoiseParams noise;

  // Tensors
  void* stats = nullptr;  // (kStatRows, groups), compute dtype
  Operand input;
  Operand output;       // forward: the output; backward: the gradient of the input (null: not wanted)
  Operand grad_output;  // backward

  // Fused operations; null data where there is none
  Operand addend;     // forward: added to the input; their sum is normalized
  Operand sum;        // forward: that sum, rounded as it is written here
  Operand residual;   // forward: added to the output, before the activation
  Activation activation = Activation::kNone;  // forward: applied to the output; backward: to its gradient
  Operand activated;  // backward, with an activation: the forward pass's output
  Operand grad_sum;   // backward: added to the gradient of the input

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

namespace {

NN_HD int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

}  // namespace normnorm
