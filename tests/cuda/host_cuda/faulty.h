// Kernels with faults that the emulator must report.
#pragma once

#include "../../../csrc/cuda/runtime.cuh"

namespace faulty {

// Half of the block waits at one barrier, the rest at another.
inline void diverging() {
  if (threadIdx.x % 2 == 0) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

// One warp waits for a shuffle partner that waits at a barrier.
inline void deadlocked() {
  if (threadIdx.x == 0) __syncthreads();
  else __shfl_xor_sync(~0u, 1.0f, 1);
}

inline void uneven_cluster() {
  if (host_cuda::cluster_rank() == 0) host_cuda::cluster_sync();
}

// The sum over a block by a shared number a thread, with a race where the barrier is left out.
inline void racing(bool barrier, float* out) {
  __shared__ float numbers[64];
  numbers[threadIdx.x] = float(threadIdx.x + 1);
  if (barrier) __syncthreads();
  float sum = 0;
  for (unsigned i = 0; i < blockDim.x; ++i) sum += numbers[i];
  out[threadIdx.x] = sum;
  __syncthreads();
  numbers[threadIdx.x] = -1.0f;
}

}  // namespace faulty
