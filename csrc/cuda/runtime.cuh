// The only file of the kernels that calls CUDA: device intrinsics, launches and device limits.
#pragma once

#include <stdint.h>

#include "plan.h"

// A build for another compiler defines this as a header with the same names.
#if defined(NN_CUDA_RUNTIME)
#include NN_CUDA_RUNTIME
#else

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#define NN_DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]

namespace normnorm {
namespace cuda {
namespace {

// Returns v as a value unknown to the compiler: what is computed from it is recomputed at its use instead of being kept in
// registers.
__device__ inline uint32_t opaque(uint32_t v) {
  asm volatile("" : "+r"(v));
  return v;
}
// The blocks of the grid, read by each call.
__device__ inline uint32_t grid_blocks() {
  uint32_t blocks;
  asm volatile("mov.u32 %0, %%nctaid.x;" : "=r"(blocks));
  return blocks;
}
// opaque() of an address, so that an offset is added to it as a whole.
template <class T>
__device__ __forceinline__ const T* opaque_address(const T* p) {
  asm("" : "+l"(p));
  return p;
}

// Loads and stores 16 bytes of global memory, aligned to 16. In assembly, because the compiler takes an opaque address for
// one of generic memory, and splits a plain store whose words come out of a branch.
__device__ __forceinline__ uint4 load_global(const void* p) {
  uint4 raw;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(raw.x), "=r"(raw.y), "=r"(raw.z), "=r"(raw.w) : "l"(p));
  return raw;
}
__device__ __forceinline__ void store_global(void* p, const uint4& raw) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(raw.x), "r"(raw.y), "r"(raw.z), "r"(raw.w));
}

// Copies 16 bytes, both addresses aligned to 16, from global to shared memory while the thread goes on. The copies since the
// last commit_copies() are a group; a thread sees its groups in their order, and only its own.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  const unsigned to = unsigned(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending groups, the latest, have not arrived.
template <int kPending>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Prefetches many bytes into L2 in one instruction of a warp, whose lanes call it together with the same arguments. Counted
// from the 16-byte boundary before p; before sm_90 nothing.
__device__ inline void prefetch_bytes(const void* p, int64_t bytes, bool wanted) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "{ .reg .pred p, q; elect.sync _|p, 0xffffffff; setp.ne.and.u32 q, %2, 0, p; "
      "@q cp.async.bulk.prefetch.L2.global [%0], %1; }" ::"l"(reinterpret_cast<intptr_t>(p) & ~intptr_t(15)),
      "r"(uint32_t(bytes) & ~15u), "r"(uint32_t(wanted)));
#endif
}

// Clusters of blocks; before sm_90 there are none, and the launchers ask for none.
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
__device__ T* in_block_of_cluster(T* p, unsigned rank) {
  return cooperative_groups::this_cluster().map_shared_rank(p, rank);
}
#endif

// Adds 1 to a counter, and makes this thread's earlier writes visible to a thread that waits for the count.
__device__ inline void arrive(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
// Waits for `count` arrivals; the writes before them are then visible. Only the last load acquires: an acquire invalidates
// L1, which the multiprocessor's other block uses.
__device__ inline void wait_for_arrivals(const unsigned* counter, unsigned count) {
  for (unsigned seen = 0;;) {
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    if (seen >= count) break;
    __nanosleep(32);
  }
  asm volatile("fence.acq_rel.gpu;" ::: "memory");
}

// What launch() returns where the device cannot run all blocks of a cooperative launch at the same time; the pass then
// streams.
constexpr int kNotCoResident = cudaErrorCooperativeLaunchTooLarge;

// Allows a kernel the largest dynamic shared memory; once for each kernel and device, from any thread.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex lock;
  static std::set<std::pair<const void*, int>> allowed;
  int id = 0, most = 0;
  cudaError_t e = cudaGetDevice(&id);
  if (e != cudaSuccess) return e;
  const std::lock_guard<std::mutex> guard(lock);
  if (allowed.count({kernel, id})) return cudaSuccess;
  cudaFuncAttributes attributes = {};
  e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (e == cudaSuccess) e = cudaFuncGetAttributes(&attributes, kernel);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - int(attributes.sharedSizeBytes));
  if (e == cudaSuccess) allowed.insert({kernel, id});
  return e;
}

// A Launch as a cudaLaunchConfig_t.
struct LaunchConfig {
  cudaLaunchAttribute attribute[1] = {};
  cudaLaunchConfig_t config = {};
  explicit LaunchConfig(const Launch& l) {
    config.gridDim = dim3(l.grid);
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared;
    config.stream = static_cast<cudaStream_t>(l.stream);
    config.attrs = attribute;
    config.numAttrs = l.cooperative || l.cluster > 1 ? 1 : 0;
    if (l.cooperative) {
      attribute[0].id = cudaLaunchAttributeCooperative;
      attribute[0].val.cooperative = 1;
    } else if (l.cluster > 1) {
      attribute[0].id = cudaLaunchAttributeClusterDimension;
      attribute[0].val.clusterDim.x = unsigned(l.cluster);
      attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    }
  }
  LaunchConfig(const LaunchConfig&) = delete;
};

// Returns an error and clears cudaGetLastError().
inline cudaError_t cleared(cudaError_t e) {
  if (e != cudaSuccess) cudaGetLastError();
  return e;
}

// How many blocks of a launch the device runs at the same time.
inline cudaError_t count_co_resident(const void* kernel, const Launch& l, const Device& device, int* blocks) {
  cudaError_t e = l.shared > 0 ? allow_shared(kernel) : cudaSuccess;
  if (e != cudaSuccess) return e;
  if (l.cluster == 1) {
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, kernel, int(l.threads), l.shared);
    *blocks *= device.multiprocessors;
    return e;
  }
  cudaFuncAttributes attributes = {};
  e = cudaFuncGetAttributes(&attributes, kernel);
  if (e != cudaSuccess || attributes.ptxVersion < 90) return e;  // code without clusters, on a device that has them
  const LaunchConfig launch(l);
  e = cudaOccupancyMaxActiveClusters(blocks, kernel, &launch.config);
  *blocks *= l.cluster;
  return e;
}

// The same, and 0 where there is no answer. Only the driver knows the registers, and a divided device's share (MIG). The
// answer is kept, so that the workspace and the launch are planned alike.
template <class... P>
int64_t co_resident_blocks(void (*kernel)(P...), const Launch& l, const Device& device) {
  using Query = std::tuple<const void*, int, unsigned, size_t, int>;
  static std::mutex lock;
  static std::map<Query, int> known;
  const void* entry = reinterpret_cast<const void*>(kernel);
  int id = 0, blocks = 0;
  if (cleared(cudaGetDevice(&id)) != cudaSuccess) return 0;
  const Query query = {entry, id, l.threads, l.shared, l.cluster};
  const std::lock_guard<std::mutex> guard(lock);
  const auto answer = known.find(query);
  if (answer != known.end()) return answer->second;
  if (cleared(count_co_resident(entry, l, device, &blocks)) != cudaSuccess) blocks = 0;
  known[query] = blocks;
  return blocks;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), const Launch& l, A... arguments) {
  if (l.shared > 0) {
    const cudaError_t e = cleared(allow_shared(reinterpret_cast<const void*>(kernel)));
    if (e != cudaSuccess) return e;
  }
  const LaunchConfig launch(l);
  return cleared(cudaLaunchKernelEx(&launch.config, kernel, P(arguments)...));
}

inline int zero(void* data, size_t bytes, void* stream) {
  return cleared(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline cudaError_t query_device(int id, Device* d) {
  int major = 0, cooperative = 0;
  cudaError_t e = cudaDeviceGetAttribute(&d->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (e == cudaSuccess)
    e = cudaDeviceGetAttribute(&d->multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  d->clusters = major >= 9;
  d->cooperative = cooperative != 0;
  d->present = true;
  return e;
}

// The limits of the current device, queried once for each device.
inline int current_device(Device* out) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static cudaError_t answer[kDevices];
  static std::once_flag queried[kDevices];
  int id = 0;
  if (const cudaError_t e = cudaGetDevice(&id)) return e;
  if (id >= kDevices) return query_device(id, out);
  std::call_once(queried[id], [&] { answer[id] = query_device(id, &known[id]); });
  *out = known[id];
  return answer[id];
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm

#endif
