// The parameters of one call of the CUDA kernels, already checked; pointers are to device memory. Neither torch nor CUDA
// here, so that bindings can include it.
#pragma once

#include <stddef.h>

#include "../common/params.h"

namespace normnorm {
namespace cuda {

// A dense parameter, or a parameter's gradient, in the storage type or the compute type; null where there is none.
struct Parameter {
  void* data = nullptr;
  bool in_storage_type = false;
};

// Which rung of the ladder (ladder.h) serves; kAuto asks the table.
enum class Rung : int { kAuto = 0, kBlock, kCluster, kGrid, kStreaming };

// What a test may force; zeros and kAuto leave the choice to the ladder.
struct Override {
  Rung rung = Rung::kAuto;
  int threads = 0, blocks = 0, teams = 0;
};

// What the ladder needs to know of a device.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;  // that one block may ask for
  bool clusters = true;
  bool cooperative = true;                 // launches
  int multiprocessor_shared = 233472;      // bytes of shared memory, of which each block costs 1024 more than it asks for
  bool present = false;  // the current device: whether blocks run at once is asked of the driver before it is relied on
};

// Tensors must lie in the noise's own order (noise.transposed == false): the columns layout where it is channels_last, the
// rows layout otherwise.
struct Problem : PassParams {
  const int64_t* seed = nullptr;  // read by the kernels, so that a replayed graph sees a new one
  Parameter weight, bias;
  Parameter grad_weight, grad_bias;  // backward
  void* workspace = nullptr;         // of the size that normnorm_cuda_workspace() tells, aligned to 16 bytes
  Override force;
};

}  // namespace cuda
}  // namespace normnorm
