// Teams: the threads that serve one group together, and the sums they take over it.
//
// A team is a block, a cluster of blocks, or several co-operating blocks anywhere on the device. All have the same
// face, so that a kernel is written once: rank() and size() deal out a group's chunks, index() and count() the
// groups, and sum() replaces each thread's addends by the team's totals, the same bits in every thread and run.
#pragma once

#include "device.cuh"
#include "ladder.h"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kMaxWarps = kLargestBlock / 32;  // of a block
constexpr int kMaxSums = 8;    // of one reduction
constexpr int kMaxCluster = kLargestCluster;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class Real>
__device__ inline Real warp_sum(Real v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

template <class Real>
class BlockTeam {
 public:
  static constexpr int kThreads = kLargestBlock;
  struct Sync {};  // nothing to be told by the launcher

  __device__ explicit BlockTeam(Sync) {
    __shared__ Real partial[2 * kMaxSums * kMaxWarps];
    partial_ = partial;
  }
  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ unsigned size() const { return blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x; }
  __device__ unsigned count() const { return gridDim.x; }

  // Two buffers in turn: a warp that runs ahead into the next sum writes to the other one, and cannot reach the one
  // after before all have passed the next barrier, hence have read this one.
  template <int K>
  __device__ void sum(Real (&v)[K]) {
    static_assert(K <= kMaxSums, "the shared buffer is too small");
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
    if (warps == 1) return;
    Real* buffer = partial_ + turn_ * kMaxSums * kMaxWarps;
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k * kMaxWarps + warp] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(lane < warps ? buffer[k * kMaxWarps + lane] : Real(0));
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

template <class Real>
class ClusterTeam {
 public:
  static constexpr int kThreads = kLargestBlock;
  struct Sync {};

  __device__ explicit ClusterTeam(Sync) {
    __shared__ Real partial[2 * kMaxSums * kMaxCluster * kMaxWarps];
    partial_ = partial;
    cluster_sync();  // no block's shared memory may be written before that block runs
  }
  __device__ unsigned rank() const { return cluster_rank() * blockDim.x + threadIdx.x; }
  __device__ unsigned size() const { return cluster_size() * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x / cluster_size(); }
  __device__ unsigned count() const { return gridDim.x / cluster_size(); }

  // Each warp's total goes to every block of the cluster, so that one barrier does for both floors. Two buffers in
  // turn, as in BlockTeam.
  template <int K>
  __device__ void sum(Real (&v)[K]) {
    static_assert(K <= kMaxSums, "the shared buffer is too small");
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
    Real* buffer = partial_ + turn_ * kMaxSums * kMaxCluster * kMaxWarps;
    turn_ ^= 1;
    const unsigned entries = cluster_size() * warps;
    if (lane < cluster_size()) {
      Real* there = in_block_of_cluster(buffer, lane) + cluster_rank() * warps + warp;
#pragma unroll
      for (int k = 0; k < K; ++k) there[k * kMaxCluster * kMaxWarps] = v[k];
    }
    cluster_sync();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Real total = 0;
      for (unsigned i = lane; i < entries; i += 32) total += buffer[k * kMaxCluster * kMaxWarps + i];
      v[k] = warp_sum(total);
    }
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

// Blocks b, b + teams, b + 2 teams ... of a cooperative launch, which guarantees that all of them run at once.
template <class Real>
class GridTeam {
 public:
  static constexpr int kThreads = kGridBlock;
  struct Sync {
    unsigned* counters;  // one a team, zeroed before the launch
    Real* partial;       // [team][2][kMaxSums][blocks]
    unsigned blocks;     // of a team
  };

  __device__ explicit GridTeam(Sync sync) : block_({}), sync_(sync) {}
  __device__ unsigned rank() const { return blockIdx.x / count() * blockDim.x + threadIdx.x; }
  __device__ unsigned size() const { return sync_.blocks * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x % count(); }
  __device__ unsigned count() const { return gridDim.x / sync_.blocks; }

  // Two buffers in turn, as in BlockTeam. L2 is where blocks meet: the reads must pass over L1 (__ldcg).
  template <int K>
  __device__ void sum(Real (&v)[K]) {
    block_.sum(v);
    Real* buffer = sync_.partial + size_t(index() * 2 + turn_) * kMaxSums * sync_.blocks;
    turn_ ^= 1;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k * sync_.blocks + blockIdx.x / count()] = v[k];
      barrier();
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      Real total = 0;
      for (unsigned i = threadIdx.x % 32; i < sync_.blocks; i += 32) total += __ldcg(buffer + k * sync_.blocks + i);
      v[k] = warp_sum(total);
    }
  }

 private:
  // The count only grows: barrier number e is passed when it has reached e times the team's blocks.
  __device__ void barrier() {
    unsigned* counter = sync_.counters + index();
    passed_ += sync_.blocks;
    arrive(counter);
    while (arrived(counter) < passed_) __nanosleep(32);
  }

  BlockTeam<Real> block_;
  Sync sync_;
  unsigned turn_ = 0, passed_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
