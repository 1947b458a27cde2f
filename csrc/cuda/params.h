// The parameters of one call of the CUDA kernels, already checked; pointers are to device memory. Includes neither torch nor
// CUDA, so that bindings can include it.
#pragma once

#include <stddef.h>

#include "../common/params.h"

namespace normnorm {
namespace cuda {

// A dense parameter or its gradient, in the storage type or the compute type; null data where there is none.
struct Parameter {
  void* data = nullptr;
  bool in_storage_type = false;
};

// Where a group is kept between the rounds (the table in plan.h); kAuto chooses by size.
enum class Tier : int { kAuto = 0, kBlock, kCluster, kGrid, kStreaming };

// Overrides for tests; zeros and kAuto leave the choice to choose_plan().
struct Override {
  Tier tier = Tier::kAuto;
  int threads = 0, blocks = 0, thread_groups = 0;  // as in Plan
};

// The limits of a device that a plan depends on.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;  // shared memory available to one block
  bool clusters = true;
  bool cooperative = true;             // cooperative launches
  int multiprocessor_shared = 233472;  // bytes of shared memory; each block takes 1024 more than it asks for
  bool present = false;  // the current device: the driver is asked whether blocks are co-resident before it is relied on
};

// Tensors must lie in the noise's own order (noise.transposed == false): the columns layout where it is channels_last, the
// rows layout otherwise.
struct Problem : PassParams {
  const int64_t* seed = nullptr;  // read by the kernels, so that a replayed graph draws from a new seed
  Parameter weight, bias;
  Parameter grad_weight, grad_bias;  // backward
  void* workspace = nullptr;         // of normnorm_cuda_workspace() bytes, aligned to 16
  Override force;
};

// A buffer of one number a channel, of any floating type and stride.
struct Buffer {
  void* data = nullptr;
  Storage storage = Storage::kFloat32;
  int64_t stride = 1;
};

// The parameters of the kernels that update running statistics or read them.
struct RunningStatistics {
  Buffer mean, var, lmbda;
  int64_t channels = 0;
  double eps = 1e-5;
  // the statistics tensor
  bool double_stats = false;  // float64
  void* stats = nullptr;
  int64_t row_stride = 0, group_stride = 1;
  // the update only
  int64_t groups = 0;              // a multiple of channels: a channel takes the mean over its groups
  int64_t* tracked = nullptr;      // number of batches, incremented; null where not kept
  bool cumulative = false;         // weight 1/tracked instead of momentum
  double momentum = 0, count = 0;  // count: elements in a group
};

// f(tensor) for every tensor that a pass reads or writes.
template <class F>
void each_operand(const Problem& p, bool backward, F f) {
  const auto given = [&](const Operand& t) {
    if (t.data) f(t);
  };
  f(p.input);
  given(p.output);
  if (backward) {
    f(p.grad_output);
    given(p.activated);
    given(p.grad_sum);
  } else {
    given(p.residual);
    given(p.addend);
    if (p.addend.data) f(p.sum);
  }
}

inline bool has_activation(const Problem& p) { return p.activation != Activation::kNone; }

// Whether a pass has fused operations where it first reads a group, and where it last does.
inline bool fuses_prologue(const Problem& p, bool backward) {
  return backward ? has_activation(p) : p.addend.data != nullptr;
}
inline bool fuses_epilogue(const Problem& p, bool backward) {
  return has_activation(p) || (backward ? p.grad_sum.data : p.residual.data);
}
inline bool is_fused(const Problem& p, bool backward) {
  return fuses_prologue(p, backward) || fuses_epilogue(p, backward);
}

}  // namespace cuda
}  // namespace normnorm
