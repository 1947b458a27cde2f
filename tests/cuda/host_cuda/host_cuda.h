// The part of CUDA that csrc/cuda uses, for a host compiler: the kernels' own source runs on the CPU under it.
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

// Notes the site; true where a mutation leaves this barrier out.
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
inline unsigned cluster_size() { return unsigned(block->company->size); }

inline void cluster_sync(Location l = Location::current()) {
  if (skipped(l)) return;
  Barrier& b = block->cluster_barrier;
  if (b.arrived + 1 == b.members) wait_for_company();  // the last of the block waits for the other blocks
  wait_at(b, l);
}

template <class T>
T* in_block_of_cluster(T* p, unsigned rank) {
  if (!block->company->running[rank]) fail("shared memory of a block that does not run is written");
  return reinterpret_cast<T*>(reinterpret_cast<char*>(p) - mark + block->company->mark[rank]);
}

// The counters of a grid barrier; a mutated one lets everybody through.
inline void arrive(unsigned* counter) {
  block->company->met[size_t(block->rank)] = true;
  std::atomic_ref<unsigned>(*counter).fetch_add(1);
}
inline void wait_for_arrivals(unsigned* counter, unsigned count, Location l = Location::current()) {
  if (skipped(l)) return;
  while (std::atomic_ref<unsigned>(*counter).load() < count)
    wait_a_little("a block of the grid ended while others wait at the grid barrier");
}

template <class T>
T exchange(T v, int source) {
  static_assert(sizeof(T) <= 8);
  Fibre& f = *block->current;
  Warp& w = *f.warp;
  uint64_t* slot = w.slot[f.shuffles++ & 1];  // two in turn: no second wait
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
