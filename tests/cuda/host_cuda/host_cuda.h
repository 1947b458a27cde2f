// The runtime of the tests: runs the kernels of csrc/cuda on the CPU, compiled by a host compiler with
// -DNN_CUDA_RUNTIME=<host_cuda.h>. The names of csrc/cuda/runtime.cuh, and the part of CUDA that the kernels use.
//
// Not modelled: memory ordering and true concurrency within a block, divergence with partial masks, and the rounding
// of special-function instructions.
#pragma once

#include <cuda_runtime.h>  // NVIDIA's own vector types, whose __device__ and __global__ mean nothing to g++
#include <cuda_bf16.h>     // NVIDIA's own conversions
#include <cuda_fp16.h>

#include <algorithm>
#include <source_location>

#include "engine.h"

#undef __shared__
#define __shared__ static thread_local  // a block is an operating system thread
#undef __launch_bounds__
#define __launch_bounds__(...)
#undef __forceinline__
#define __forceinline__ inline
#define NN_DYNAMIC_SHARED(name) unsigned char* name = host_cuda::dynamic_shared

#define threadIdx (host_cuda::block->current->thread)
#define blockIdx (host_cuda::block->block_index)
#define blockDim (host_cuda::block->block_dim)
#define gridDim (host_cuda::block->grid_dim)

namespace host_cuda {

using Location = std::source_location;

inline std::string site_name(const Location& l) {
  const std::string file = l.file_name();
  return file.substr(file.find_last_of('/') + 1) + ":" + std::to_string(l.line());
}

// Records the barrier's site; true where a mutation leaves this barrier out.
inline bool skipped(const Location& l) {
  Settings& s = settings();
  if (!s.watch) return false;
  const std::string site = site_name(l);
  std::lock_guard<std::mutex> guard(s.lock);
  s.sites.insert(site);
  return s.skip == site;
}

inline void wait_at(Barrier& b, const Location& l) {
  if (b.arrived > 0 && (b.line != l.line() || strcmp(b.file, l.file_name()) != 0))
    fail("threads of one block wait at different barriers, one of them " + site_name(l));
  b.file = l.file_name();
  b.line = l.line();
  wait_for(b);
}

inline unsigned cluster_rank() { return unsigned(block->rank); }
inline unsigned cluster_size() { return unsigned(block->concurrent->size); }

inline void cluster_sync(Location l = Location::current()) {
  if (skipped(l)) return;
  Barrier& b = block->cluster_barrier;
  if (b.arrived + 1 == b.members) wait_for_blocks();  // the block's last thread waits for the other blocks
  wait_at(b, l);
}

template <class T>
T* in_block_of_cluster(T* p, unsigned rank) {
  if (!block->concurrent->running[rank]) fail("shared memory of a block that does not run is written");
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) - mark + block->concurrent->mark[rank]);
}

// The counters of a grid barrier; one that is left out opens at once.
inline void arrive(unsigned* counter) {
  block->concurrent->met[size_t(block->rank)] = true;
  std::atomic_ref<unsigned>(*counter).fetch_add(1);
}
inline void wait_for_arrivals(unsigned* counter, unsigned count, Location l = Location::current()) {
  if (skipped(l)) return;
  while (std::atomic_ref<unsigned>(*counter).load() < count)
    yield_to_blocks("a block of the grid ended while others wait at the grid barrier");
}

template <class T>
T exchange(T v, int source) {
  static_assert(sizeof(T) <= 8);
  Fibre& f = *block->current;
  Warp& w = *f.warp;
  uint64_t* slot = w.slot[f.shuffles++ & 1];  // two in turn: no second barrier
  memcpy(&slot[f.lane], &v, sizeof v);
  wait_for(w.barrier);
  memcpy(&v, &slot[source], sizeof v);
  return v;
}

}  // namespace host_cuda

inline void __syncthreads(host_cuda::Location l = host_cuda::Location::current()) {
  if (!host_cuda::skipped(l)) host_cuda::wait_at(host_cuda::block->barrier, l);
}
template <class T>
T __shfl_xor_sync(unsigned, T v, int mask) {
  return host_cuda::exchange(v, host_cuda::block->current->lane ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T v, int source) {
  return host_cuda::exchange(v, source);
}
template <class T>
T __ldcg(const T* p) {
  return std::atomic_ref<T>(*const_cast<T*>(p)).load();
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }

namespace normnorm {
namespace cuda {
namespace {

using host_cuda::arrive;
using host_cuda::cluster_rank;
using host_cuda::cluster_size;
using host_cuda::cluster_sync;
using host_cuda::in_block_of_cluster;
using host_cuda::wait_for_arrivals;

inline uint32_t opaque(uint32_t v) { return v; }
inline uint32_t grid_blocks() { return gridDim.x; }
template <class T>
const T* opaque_address(const T* p) {
  return p;
}
inline uint4 load_global(const void* p) { return *static_cast<const uint4*>(p); }
inline void store_global(void* p, const uint4& raw) { *static_cast<uint4*>(p) = raw; }
// Copies arrive when they are waited for; until then the destination holds NaNs.
inline auto& copies() { return host_cuda::block->current->copies; }
inline void copy_async(void* shared, const void* global) { copies().push_back({memset(shared, 0xff, 16), global}); }
inline void commit_copies() { copies().push_back({}); }
template <int kPending>
void wait_for_copies() {
  const auto end = std::pair<void*, const void*>();
  for (auto groups = std::count(copies().begin(), copies().end(), end); groups > kPending; copies().pop_front())
    if (const auto [to, from] = copies().front(); to) memcpy(to, from, 16);
    else --groups;
}
inline void prefetch_bytes(const void*, int64_t, bool) {}

constexpr int kNotCoResident = cudaErrorCooperativeLaunchTooLarge;

template <class... P>
int64_t co_resident_blocks(void (*)(P...), const Launch&, const Device&) { return host_cuda::settings().co_resident; }
template <class... P, class... A>
int launch(void (*kernel)(P...), const Launch& l, A... arguments) {
  const int concurrent = l.cooperative ? int(l.grid) : l.cluster;
  if (l.shared > host_cuda::kDynamicShared) return cudaErrorInvalidValue;
  if (l.cooperative && host_cuda::settings().refuse_cooperative) return kNotCoResident;
  host_cuda::settings().launches.push_back({int(l.grid), l.cluster, l.cooperative});
  host_cuda::run_grid(dim3(l.grid), dim3(l.threads), concurrent, [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline int zero(void* data, size_t bytes, void*) {
  memset(data, 0, bytes);
  return cudaSuccess;
}
inline int current_device(Device* out) {
  (*out = host_cuda::settings().device).present = true;
  return cudaSuccess;
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
