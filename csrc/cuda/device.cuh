// What every kernel includes: CUDA under nvcc, the tests' host-execution layer under a host compiler.
#pragma once

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define NN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#else
#include "host_cuda.h"  // tests/cuda/host_cuda
#endif
#include <stdint.h>

namespace normnorm {
namespace cuda {
namespace {

// v, of which the compiler knows nothing: what is computed from it is computed anew, instead of being kept in registers
// for longer than it is worth.
__device__ inline uint32_t opaque(uint32_t v) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+r"(v));
#endif
  return v;
}

// Brings memory that will be read as far as L2: what lies ahead of a thread that has no registers to read it into.
__device__ inline void expect(const void* p) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
#endif
}

// Clusters of blocks; before sm_90 there is none, and the launchers ask for none.
#if defined(__CUDACC__)
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
__device__ inline unsigned cluster_rank() { return 0; }
__device__ inline unsigned cluster_size() { return 1; }
__device__ inline void cluster_sync() {}
template <class T>
__device__ T* in_block_of_cluster(T* p, unsigned) { return p; }
#else
__device__ inline unsigned cluster_rank() { return cooperative_groups::this_cluster().block_rank(); }
__device__ inline unsigned cluster_size() { return cooperative_groups::this_cluster().num_blocks(); }
__device__ inline void cluster_sync() { cooperative_groups::this_cluster().sync(); }
template <class T>
__device__ T* in_block_of_cluster(T* p, unsigned rank) { return cooperative_groups::this_cluster().map_shared_rank(p, rank); }
#endif
// Adds `count` where the writes of this thread before it become visible to whoever sees the sum.
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits for `count` arrivals, and sees what was written before them. Only the last look acquires: each that does empties
// L1 of what the multiprocessor's other block has read.
__device__ inline void wait_for_arrivals(const unsigned* counter, unsigned count) {
  for (unsigned seen = 0;;) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= count) break;
    __nanosleep(32);
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}
#else
using host_cuda::arrive;
using host_cuda::cluster_rank;
using host_cuda::cluster_size;
using host_cuda::cluster_sync;
using host_cuda::in_block_of_cluster;
using host_cuda::wait_for_arrivals;
#endif

}  // namespace
}  // namespace cuda
}  // namespace normnorm
