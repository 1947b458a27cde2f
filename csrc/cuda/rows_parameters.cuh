// The gradients of weights that vary within a group, where the pass over the group does not sum them itself: a pass of
// their own over input and gradient, whose parts fold_parts() adds up.
#pragma once

#include "rows_stream.cuh"

namespace normnorm {
namespace cuda {
namespace {

// g and g (x + noise z) of a chunk. kAligned: a counter of the noise begins with the chunk.
template <class T, bool kRagged, bool kAligned, class Real>
__device__ __forceinline__ void parameter_terms(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                                const GroupConstants<Real>& k, const PhiloxSchedule& keys, Real (&grad)[kChunkOf<T>],
                                                Real (&x)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  read_chunk<T, kRagged>(a.grad, g.grad, a.at_grad, c, grad);
  join_mask<true>(ChunkAt<T, kRagged>{g, c}, a.joined, Fetched<T, true>(), grad);
  if (a.weight_part == nullptr) return;
  read_chunk<T, kRagged>(a.input, g.input, a.at_input, c, x);
  with_path(k.path, [&](auto tag) { input_to_x<tag.value>(k, x); });
  if (a.noise) {
    const Real noise = a.noise_train * k.noise_scale * kNormalUnit<Real>;
    if constexpr (kAligned) {
      add_noise<kRagged>(a, g, c, keys, noise, x);
    } else {
      Real z[N];
      unaligned_normals<N>(a, g, c, keys, z);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += noise * z[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = !kRagged || c.span.has(j) ? x[j] * grad[j] : Real(0);
}

// A weight a run: one warp sums one run of one group; part is (outer, inner x runs).
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) run_parameters(const RowsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const uint32_t warps = blockDim.x / 32;
  const uint64_t item = uint64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= uint64_t(a.groups) * a.runs) return;
  const uint32_t group = uint32_t(item / a.runs), run = uint32_t(item - uint64_t(group) * a.runs);
  const GroupPlace g = locate_group(a, group);
  const GroupConstants<Real> k = constants_of(a, group);
  const PhiloxSchedule keys(a.noise ? uint64_t(*a.seed) : 0);
  Real weight = 0, bias = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < a.chunks_per_run.divisor; i += 32) {
    Real grad[N], x[N] = {};
    const ChunkPlace c = locate_chunk<kRagged, N>(a, g, run * a.chunks_per_run.divisor + i);
    parameter_terms<T, kRagged, true>(a, g, c, k, keys, grad, x);
#pragma unroll
    for (int j = 0; j < N; ++j) bias += grad[j], weight += x[j];
  }
  weight = warp_sum(weight);
  bias = warp_sum(bias);
  if (threadIdx.x % 32 > 0) return;
  if (a.weight_part) a.weight_part[item] = weight;
  if (a.bias_part) a.bias_part[item] = bias;
}

// A weight an element: a thread walks down the groups with one chunk's columns; part is (slabs, length). Ragged chunks
// differ between groups, so there a chunk is a fixed window of the run.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) element_parameters_pass(const RowsArgs<RealOf<T>> a, uint32_t slabs) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const uint32_t slab = blockIdx.x % slabs, chunk = blockIdx.x / slabs * blockDim.x + threadIdx.x;
  const int64_t first = int64_t(chunk) * N;
  if (first >= a.length) return;
  const PhiloxSchedule keys(a.noise ? uint64_t(*a.seed) : 0);
  Real weight[N] = {}, bias[N] = {};
#pragma unroll 1
  for (uint32_t group = slab; group < a.groups; group += slabs) {
    const GroupPlace g = locate_group(a, group);
    const GroupConstants<Real> k = constants_of(a, group);
    const int64_t left = a.length - first;
    const ChunkPlace c = {chunk, 0, first, {0, left < N ? int(left) : N}, !kRagged};
    Real grad[N], x[N] = {};
    parameter_terms<T, kRagged, !kRagged>(a, g, c, k, keys, grad, x);
#pragma unroll
    for (int j = 0; j < N; ++j) bias[j] += grad[j], weight[j] += x[j];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (first + j >= a.length) break;
    if (a.weight_part) a.weight_part[slab * a.length + first + j] = weight[j];
    if (a.bias_part) a.bias_part[slab * a.length + first + j] = bias[j];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
