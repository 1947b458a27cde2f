// What the kernels of the running statistics are given: device pointers, already checked.
#pragma once

#include "problem.h"

namespace normnorm {
namespace cuda {

// A buffer of one number a channel, of any floating type and stride.
struct Buffer {
  void* data = nullptr;
  Storage storage = Storage::kFloat32;
  int64_t stride = 1;
};

struct RunningStatistics {
  Buffer mean, var, lmbda;
  int64_t channels = 0;
  double eps = 1e-5;
  bool double_stats = false;  // the statistics tensor is float64
  void* stats = nullptr;
  int64_t row_stride = 0, group_stride = 1;  // of the statistics tensor

  // folding only
  int64_t groups = 0;              // a multiple of channels: their mean counts
  int64_t* tracked = nullptr;      // number of batches, incremented; null where not kept
  bool cumulative = false;         // weigh by 1/tracked instead of momentum
  double momentum = 0, count = 0;  // count: elements in a group
};

}  // namespace cuda
}  // namespace normnorm
