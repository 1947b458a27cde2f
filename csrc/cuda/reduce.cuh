// Thread groups: the threads that process one group together, and reductions over them.
//
// A thread group is a block, a cluster of blocks, or several co-operating blocks anywhere on the device. All have the same
// interface, so that a kernel is written once: rank() and size() divide a group's chunks, index() and count() the groups,
// and sum() replaces each thread's addends by the totals, the same bits in every thread and run. Registers are scarce: what
// these functions derive from opaque() and grid_blocks() is computed by each call; kept between calls it was spilled.
#pragma once

#include "io.cuh"
#include "plan.h"
#include "runtime.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kMaxWarps = kLargestBlock / 32;  // of a block
constexpr int kMaxSums = 8;                    // of one reduction; half as many doubles where Real is float
constexpr int kMaxCluster = kLargestCluster;
// Numbers in the static shared memory of a cluster's block; a single block needs fewer.
constexpr int kReduceNumbers = 2 * kMaxSums * kMaxCluster * kMaxWarps;
constexpr unsigned kAllLanes = 0xffffffffu;

// The sum over the lanes whose numbers are equal modulo kLanes, in each of them.
template <int kLanes = 1, class V>
__device__ inline V warp_sum(V v) {
#pragma unroll
  for (int offset = 16; offset >= kLanes; offset >>= 1) v += __shfl_xor_sync(kAllLanes, v, offset);
  return v;
}

// K rounded up to a power of two.
template <int K>
constexpr int kLanesFor = K == 1 ? 1 : 2 * kLanesFor<(K + 1) / 2>;

// K sums over a warp at once: lane l is left with the total of v[k], k = l % kLanesFor<K> (or of the last). At each
// level a lane keeps half of its numbers and gives its neighbour the other half: K + 1 to K + 3 shuffles for K = 2 to 8,
// instead of 5 K.
template <int kLevel = 1, class V, int K>
__device__ __forceinline__ V transposed_sum(const V (&v)[K]) {
  if constexpr (K == 1) {
    return warp_sum<kLevel>(v[0]);
  } else {
    const bool odd = threadIdx.x & kLevel;
    V kept[(K + 1) / 2];
#pragma unroll
    for (int i = 0; i < K / 2; ++i) {
      const V given = odd ? v[2 * i] : v[2 * i + 1];
      kept[i] = (odd ? v[2 * i + 1] : v[2 * i]) + __shfl_xor_sync(kAllLanes, given, kLevel);
    }
    if constexpr (K % 2 == 1) kept[K / 2] = v[K - 1] + __shfl_xor_sync(kAllLanes, v[K - 1], kLevel);
    return transposed_sum<2 * kLevel>(kept);
  }
}
// The K totals, in every lane.
template <class V, int K>
__device__ __forceinline__ void share_totals(V total, V (&v)[K]) {
#pragma unroll
  for (int k = 0; k < K; ++k) v[k] = K == 1 ? total : __shfl_sync(kAllLanes, total, k);
}

template <class Real>
class BlockThreads {
 public:
  struct Sync {};  // what the launcher provides

  __device__ explicit BlockThreads(Sync) {
    alignas(16) __shared__ Real partial[2 * kMaxSums * kMaxWarps];
    partial_ = partial;
  }
  __device__ unsigned rank() const { return threadIdx.x; }
  __device__ unsigned size() const { return blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x; }
  __device__ unsigned count() const { return grid_blocks(); }

  // Two buffers in turn: a warp that runs ahead into the next sum writes to the other buffer, and reaches this one again
  // only after the next barrier, which every warp passes after having read it.
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    static_assert(K * sizeof(V) <= kMaxSums * sizeof(Real), "the shared buffer is too small");
    constexpr unsigned kLanes = kLanesFor<K>;
    const unsigned warps = blockDim.x / 32, lane = threadIdx.x % 32;
    V total = transposed_sum(v);
    if (warps > 1) {
      V* buffer = reinterpret_cast<V*>(partial_ + turn_ * kMaxSums * kMaxWarps);
      turn_ ^= 1;
      if (lane < kLanes) buffer[threadIdx.x / 32 * kLanes + lane] = total;
      __syncthreads();
      total = 0;
#pragma unroll
      for (unsigned first = 0; first < kMaxWarps * kLanes; first += 32)
        if (first + lane < warps * kLanes) total += buffer[first + lane];
      total = warp_sum<kLanes>(total);
    }
    share_totals(total, v);
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

template <class Real>
class ClusterThreads {
 public:
  struct Sync {};

  __device__ explicit ClusterThreads(Sync) {
    alignas(16) __shared__ Real partial[kReduceNumbers];
    partial_ = partial;
    cluster_sync();  // no block's shared memory may be written before that block runs
  }
  __device__ unsigned rank() const { return cluster_rank() * blockDim.x + opaque(threadIdx.x); }
  __device__ unsigned size() const { return cluster_size() * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x / cluster_size(); }
  __device__ unsigned count() const { return grid_blocks() / cluster_size(); }

  // Each warp writes its total to every block of the cluster, so that one barrier is enough. Two buffers in turn, as in
  // BlockThreads.
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    static_assert(K * sizeof(V) <= kMaxSums * sizeof(Real), "the shared buffer is too small");
    constexpr unsigned kLanes = kLanesFor<K>;
    static_assert(kLanes == K && kLanes * kMaxCluster <= 32, "a lane writes one total to one block");
    const unsigned warps = blockDim.x / 32, warp = opaque(threadIdx.x) / 32, lane = threadIdx.x % 32;
    V total = transposed_sum(v);
    V* buffer = reinterpret_cast<V*>(partial_ + turn_ * kMaxSums * kMaxCluster * kMaxWarps);
    turn_ ^= 1;
    const unsigned entries = cluster_size() * warps * kLanes;
    if (lane < cluster_size() * kLanes)
      in_block_of_cluster(buffer, lane / kLanes)[(cluster_rank() * warps + warp) * kLanes + lane % kLanes] = total;
    cluster_sync();
    total = 0;
#pragma unroll 1  // unrolled, its bounds would take five registers throughout the kernel
    for (unsigned i = lane; i < entries; i += 32) total += buffer[i];
    share_totals(warp_sum<kLanes>(total), v);
  }

 private:
  Real* partial_;
  unsigned turn_ = 0;
};

// Neighbouring blocks of a cooperative launch, which guarantees that all of them run at the same time. Devices assign
// successive blocks to different multiprocessors, so that the two blocks of a multiprocessor belong to different thread
// groups, and one computes while the other waits.
template <class Real>
class GridThreads {
 public:
  struct Sync {
    unsigned* counters;  // one a thread group, zeroed before the launch
    Real* partial;       // [thread group][2][blocks][kMaxSums]
    unsigned blocks;     // of a thread group
  };

  __device__ explicit GridThreads(Sync sync) : block_({}), sync_(sync) {}
  __device__ unsigned rank() const { return block() * blockDim.x + threadIdx.x; }
  __device__ unsigned size() const { return sync_.blocks * blockDim.x; }
  __device__ unsigned index() const { return blockIdx.x / sync_.blocks; }
  __device__ unsigned count() const { return grid_blocks() / sync_.blocks; }

  // Two buffers in turn, as in BlockThreads. Blocks exchange data through L2: the loads bypass L1 (__ldcg).
  template <class V, int K>
  __device__ void sum(V (&v)[K]) {
    block_.sum(v);
    // recomputed: kept between sums these would take registers
    const unsigned at = opaque(blockIdx.x), index = at / sync_.blocks, block = at % sync_.blocks;
    V* buffer = reinterpret_cast<V*>(sync_.partial + size_t(index * 2 + turn_) * kMaxSums * sync_.blocks);
    turn_ ^= 1;
    if (threadIdx.x == 0) {
#pragma unroll
      for (int k = 0; k < K; ++k) buffer[block * K + k] = v[k];
      barrier(sync_.counters + index);
    }
    __syncthreads();
    static_assert(kLanesFor<K> == K, "a lane adds the totals of one number");
    V total = 0;
    for (unsigned i = threadIdx.x % 32; i < sync_.blocks * K; i += 32) total += __ldcg(buffer + i);
    share_totals(warp_sum<K>(total), v);
  }

 private:
  __device__ unsigned block() const { return opaque(blockIdx.x) % sync_.blocks; }

  // The counter only grows: barrier number e opens when it reaches e times the number of blocks.
  __device__ void barrier(unsigned* counter) {
    passed_ += sync_.blocks;
    arrive(counter);
    wait_for_arrivals(counter, passed_);
  }

  BlockThreads<Real> block_;
  Sync sync_;
  unsigned turn_ = 0, passed_ = 0;
};

constexpr int kReduceColumns = 32, kReduceRows = 32;  // of a block

// out[i] = sum over p of partial[p][i], in a fixed order; a block takes kReduceColumns neighbouring columns.
template <class T>
__global__ void __launch_bounds__(kReduceColumns* kReduceRows)
reduce_partials(const RealOf<T>* partial, int64_t partials, int64_t count, void* out, bool in_storage) {
  using Real = RealOf<T>;
  __shared__ Real sums[kReduceRows][kReduceColumns];
  const unsigned column = threadIdx.x % kReduceColumns, row = threadIdx.x / kReduceColumns;
  const int64_t i = int64_t(blockIdx.x) * kReduceColumns + column;
  Real total = 0;
  if (i < count)
    for (int64_t p = row; p < partials; p += kReduceRows) total += partial[p * count + i];
  sums[row][column] = total;
  __syncthreads();
  if (row > 0 || i >= count) return;
  total = 0;
#pragma unroll
  for (int r = 0; r < kReduceRows; ++r) total += sums[r][column];
  if (in_storage) static_cast<T*>(out)[i] = from_real<T>(total);
  else static_cast<Real*>(out)[i] = total;
}

// Memory for `count` partial gradients of a parameter; a single one is the gradient itself where the types agree.
template <class T>
RealOf<T>* gradient_partials(Workspace& workspace, const Parameter& gradient, int64_t count, int64_t elements) {
  using Real = RealOf<T>;
  if (count == 1 && (!gradient.in_storage_type || sizeof(T) == sizeof(Real))) return static_cast<Real*>(gradient.data);
  Real* partial = workspace.take<Real>(count * elements);
  static Real counted;  // not null while the workspace is only counted: the gradient is wanted
  return partial ? partial : &counted;
}

template <class T>
int reduce_gradient(const RealOf<T>* partial, int64_t count, int64_t elements, const Parameter& gradient, void* stream) {
  if (gradient.data == nullptr || partial == gradient.data) return 0;
  const unsigned blocks = unsigned(ceil_div(elements, kReduceColumns));
  const Launch l = {.grid = blocks, .threads = kReduceColumns * kReduceRows, .stream = stream};
  return launch(reduce_partials<T>, l, partial, count, elements, gradient.data, gradient.in_storage_type);
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
