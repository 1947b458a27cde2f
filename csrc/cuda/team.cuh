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
constexpr int kMaxSums = 8;    // of one reduction; half as many where they are doubles and Real is float
constexpr int kMaxCluster = kLargestCluster;
// Numbers in the static shared memory of a cluster's block; a block alone needs fewer.
constexpr int kTeamNumbers = 2 * kMaxSums * kMaxCluster * kMaxWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

template <class V>
__device__ inline V warp_sum(V v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

template <class Real>
class BlockTeam {
 public:
  struct Sync {};  // nothing to be told by the launcher

  __device__ explicit BlockTeam(Sync) {
    alignas(16) __shared__ Real partial[2 * kMaxSums * kMaxWarps];
    partial_ = partial;
  }
  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ unsigned size() const { return blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x; }
  __device__ unsigned count() const { return gridDim.x; }

  // Two buffers in turn: a warp that runs ahead into the next sum writes to the other one, and cannot reach the one
  // after before all have passed the next barrier, hence have read this one.
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    static_assert(K * sizeof(V) <= kMaxSums * sizeof(Real), "the shared buffer is too small");
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
    if (warps == 1) return;
    V* buffer = reinterpret_cast<V*>(partial_ + turn_ * kMaxSums * kMaxWarps);
    turn_ ^= 1;
    if (lane == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k * kMaxWarps + warp] = v[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(lane < warps ? buffer[k * kMaxWarps + lane] : V(0));
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

template <class Real>
class ClusterTeam {
 public:
  struct Sync {};

  __device__ explicit ClusterTeam(Sync) {
    alignas(16) __shared__ Real partial[kTeamNumbers];
    partial_ = partial;
    cluster_sync();  // no block's shared memory may be written before that block runs
  }
  __device__ unsigned rank() const { return cluster_rank() * blockDim.x + threadIdx.x; }
  __device__ unsigned size() const { return cluster_size() * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x / cluster_size(); }
  __device__ unsigned count() const { return gridDim.x / cluster_size(); }

  // Each warp's total goes to every block of the cluster, so that one barrier does for both floors. Two buffers in
  // turn, as in BlockTeam.
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    static_assert(K * sizeof(V) <= kMaxSums * sizeof(Real), "the shared buffer is too small");
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < K; ++k) v[k] = warp_sum(v[k]);
    V* buffer = reinterpret_cast<V*>(partial_ + turn_ * kMaxSums * kMaxCluster * kMaxWarps);
    turn_ ^= 1;
    const unsigned entries = cluster_size() * warps;
    if (lane < cluster_size()) {
      V* there = in_block_of_cluster(buffer, lane) + opaque(cluster_rank() * warps + warp);
#pragma unroll
      for (int k = 0; k < K; ++k) there[k * kMaxCluster * kMaxWarps] = v[k];
    }
    cluster_sync();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      V total = 0;
#pragma unroll 1  // unrolled, its bounds would take five registers for as long as the kernel runs
      for (unsigned i = lane; i < entries; i += 32) total += buffer[k * kMaxCluster * kMaxWarps + i];
      v[k] = warp_sum(total);
    }
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

// Neighbouring blocks of a cooperative launch, which guarantees that all of them run at once. Devices deal blocks out to
// one multiprocessor after the other, so that where two fit on each they are of different teams, and one computes while
// the other waits.
template <class Real>
class GridTeam {
 public:
  struct Sync {
    unsigned* counters;  // one a team, zeroed before the launch
    Real* partial;       // [team][2][kMaxSums][blocks]
    unsigned blocks;     // of a team
  };

  __device__ explicit GridTeam(Sync sync) : block_({}), sync_(sync) {}
  __device__ unsigned rank() const { return block() * blockDim.x + threadIdx.x; }
  __device__ unsigned size() const { return sync_.blocks * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x / sync_.blocks; }
  __device__ unsigned count() const { return gridDim.x / sync_.blocks; }

  // Two buffers in turn, as in BlockTeam. L2 is where blocks meet: the reads must pass over L1 (__ldcg).
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    block_.sum(v);
    // where, anew: kept from sum to sum it would take registers all the while
    const unsigned at = opaque(blockIdx.x), team = at / sync_.blocks, block = at % sync_.blocks;
    V* buffer = reinterpret_cast<V*>(sync_.partial + size_t(team * 2 + turn_) * kMaxSums * sync_.blocks);
    turn_ ^= 1;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[k * sync_.blocks + block] = v[k];
      barrier(sync_.counters + team);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < K; ++k) {
      V total = 0;
      for (unsigned i = threadIdx.x % 32; i < sync_.blocks; i += 32) total += __ldcg(buffer + k * sync_.blocks + i);
      v[k] = warp_sum(total);
    }
  }

 private:
  __device__ unsigned block() const { return blockIdx.x % sync_.blocks; }

  // The count only grows: barrier number e is passed when it has reached e times the team's blocks.
  __device__ void barrier(unsigned* counter) {
    passed_ += sync_.blocks;
    arrive(counter);
    wait_for_arrivals(counter, passed_);
  }

  BlockTeam<Real> block_;
  Sync sync_;
  unsigned turn_ = 0, passed_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
