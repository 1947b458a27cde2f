// Checks of the ops' arguments, done before any pointer is read; they throw std::invalid_argument without saying which
// argument is wrong. normnorm/ops.py then runs normnorm/checks.py, which says it.
#pragma once

#include <optional>

#include "params.h"
#include "tensor_view.h"

namespace normnorm {

// With their names in the order of KINDS in normnorm/config.py.
enum class Kind { kBatch, kLayer, kGroup, kInstance };
constexpr const char* kKindNames[] = {"batch", "layer", "group", "instance"};

// The configuration arguments of an op.
struct Config {
  Kind kind = Kind::kBatch;
  int64_t num_groups = 0, normalized_ndim = 0;
  Settings<double> settings;
  double noise_train = 0;
  int64_t stream = 0;
  bool channels_last = false;
  Activation activation = Activation::kNone;
};

// The tensors of one call; an op leaves those it does not have at their defaults, not given.
struct Arguments {
  TensorView input, running_mean, running_var, running_lmbda, weight, bias, residual, seed, noise_scale;
  TensorView grad_output, stats, output, grad_sum;  // backward
  bool needs_weight = false, needs_bias = false;
  bool prenorm = false;  // forward
  bool draws = false;    // forward: the op draws a seed that is not given
  // one round over a shard of a batch, of the pass whose gradient is given or not
  TensorView sums, result;
  bool shard = false;
};

void check_forward(const Arguments& a, const Config& config);
void check_backward(const Arguments& a, const Config& config);
void check_round(const Arguments& a, const Config& config, int64_t sums);  // the number of sums of the round

struct FoldArguments {
  TensorView stats, running_mean, running_var, running_lmbda, num_batches_tracked;
  std::optional<double> momentum;
  int64_t count = 0;
  double eps = 0;
  bool shared_buffers = false;  // two of the three running statistics have the same address
};
void check_fold(const FoldArguments& a);

// The number of groups, and of elements in a group.
int64_t group_count(const TensorView& input, const Config& config);
int64_t group_size(const TensorView& input, const Config& config);

// The dtype of statistics and arithmetic for an input's dtype.
inline Dtype statistics_dtype(Dtype d) { return d == Dtype::kFloat64 ? d : Dtype::kFloat32; }

}  // namespace normnorm
