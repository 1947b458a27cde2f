// The rows walk: groups made of runs of neighbouring elements, dealt out to threads in chunks.
//
// Two modes. Aligned: every run starts on a chunk boundary and has whole chunks, in every tensor. Ragged: chunks still
// start at multiples of their size, counted in memory where all tensors agree about it and else in the order of the
// noise, so that a run begins and ends within a chunk. Either way one Philox counter never serves two chunks.
#pragma once

#include "../core/device_math.h"
#include "../core/lmbda.h"
#include "../core/statistics.h"
#include "problem.h"
#include "storage.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Division by a number known before the launch: a product and a shift (Granlund and Montgomery 1994).
struct FastDivide {
  uint32_t divisor = 1, factor = 0, shift = 0;
  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while (shift < 32 && (uint64_t(1) << shift) < d) ++shift;
    factor = uint32_t(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - d)) / d + 1);
  }
  __device__ uint32_t quotient(uint32_t n) const {
    return uint32_t((uint64_t(__umulhi(n, factor)) + n) >> shift);
  }
};

template <class Real>
struct RowsArgs {
  int64_t length;
  uint32_t groups, runs;
  FastDivide inner, chunks_per_run;
  uint32_t chunks;  // of a group
  bool one_run, wide;
  const void* input;
  const void* grad;
  void* output;
  Strides at_input, at_grad, at_output, at_noise;
  Strides chunk_origin;  // ragged: what must be a multiple of the chunk's size at its start
  int64_t chunk_base;
  Real* stats;
  const void *weight, *bias;
  bool weight_in_storage, bias_in_storage;
  Affine affine;
  const int64_t* seed;
  uint32_t stream;
  bool noise, given_scale, frozen;
  Real noise_train, inverse_count, eps, root_eps, alpha, transform_eps;
  int order;
  // backward: where sums for the parameters go, (parts, elements of the parameter); null where not wanted
  Real *weight_part, *bias_part;
};

// One group's place in the tensors.
struct GroupPlace {
  int64_t outer, inner, input, grad, output, noise, origin;
};

template <class Real>
__device__ inline int64_t group_offset(const Strides& s, int64_t outer, int64_t inner) {
  return outer * s.outer + inner * s.inner;
}

template <class Real>
__device__ inline GroupPlace locate_group(const RowsArgs<Real>& a, uint32_t group) {
  const uint32_t outer = a.inner.quotient(group);
  const uint32_t inner = group - outer * a.inner.divisor;
  return {outer, inner, group_offset<Real>(a.at_input, outer, inner), group_offset<Real>(a.at_grad, outer, inner),
          group_offset<Real>(a.at_output, outer, inner), group_offset<Real>(a.at_noise, outer, inner),
          a.chunk_base + group_offset<Real>(a.chunk_origin, outer, inner)};
}

// A chunk's place in its group: element j of it is element first + j of the run.
struct ChunkPlace {
  int64_t run, first;
  Span span;
  bool whole;
};

template <bool kRagged, int N, class Real>
__device__ inline ChunkPlace locate_chunk(const RowsArgs<Real>& a, const GroupPlace& g, uint32_t chunk) {
  const uint32_t run = a.one_run ? 0 : a.chunks_per_run.quotient(chunk);
  const int64_t first = int64_t(chunk - run * a.chunks_per_run.divisor) * N;
  if constexpr (!kRagged) {
    return {run, first, {0, N}, true};
  } else {
    const int64_t start = first - ((g.origin + run * a.chunk_origin.run) & (N - 1));
    const int lo = start < 0 ? int(-start) : 0;
    const int64_t left = a.length - start;
    const int hi = left < N ? int(left) : N;
    return {run, start, {lo, hi}, lo == 0 && hi == N && a.wide};
  }
}

template <class T, bool kRagged>
__device__ inline void read_chunk(const void* tensor, int64_t group, const Strides& s, const ChunkPlace& c,
                                  RealOf<T> (&out)[kChunkOf<T>]) {
  const T* p = static_cast<const T*>(tensor) + group + c.run * s.run + c.first;
  if (!kRagged || c.whole) load_chunk(p, out);
  else load_span(p, c.span, out);
}

template <class T, bool kRagged>
__device__ inline void write_chunk(void* tensor, int64_t group, const Strides& s, const ChunkPlace& c,
                                   const RealOf<T> (&in)[kChunkOf<T>]) {
  T* p = static_cast<T*>(tensor) + group + c.run * s.run + c.first;
  if (!kRagged || c.whole) store_chunk(p, in);
  else store_span(p, c.span, in);
}

// The standard normals of a chunk, whose first element is served by a counter's first word.
template <int N, class Real>
__device__ inline void chunk_normals(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c, const PhiloxSchedule& keys,
                                     Real (&z)[N]) {
  const int64_t position = g.noise + c.run * a.at_noise.run + c.first;
#pragma unroll
  for (int j = 0; j < N; j += 4) quad_normals(keys, a.stream, uint64_t(position + j) / 4, z + j);
}

// The same for a chunk that begins anywhere within a counter.
template <int N, class Real>
__device__ inline void unaligned_normals(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                         const PhiloxSchedule& keys, Real (&z)[N]) {
  const int64_t position = g.noise + c.run * a.at_noise.run + c.first;
  Real quad[4];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int word = int(position + j) & 3;
    if (j == 0 || word == 0) quad_normals(keys, a.stream, uint64_t(position + j) / 4, quad);
    z[j] = word & 2 ? (word & 1 ? quad[3] : quad[2]) : (word & 1 ? quad[1] : quad[0]);
  }
}

// weight (or bias) of a chunk's elements; kPerElement parameters vary along the run, the others are one number.
template <class T, bool kRagged, class Real>
__device__ inline void element_parameters(const void* data, bool in_storage, Real missing, const ChunkPlace& c,
                                          Real (&out)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if (data == nullptr) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = missing;
  } else if constexpr (kRagged) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = c.span.has(j) ? load_parameter<T>(data, in_storage, c.first + j) : Real(0);
  } else if (in_storage) {
    load_chunk(static_cast<const T*>(data) + c.first, out);
  } else {
    const float4* p = reinterpret_cast<const float4*>(static_cast<const Real*>(data) + c.first);
#pragma unroll
    for (int j = 0; j < N; j += 4) {
      const float4 v = p[j / 4];
      out[j] = v.x, out[j + 1] = v.y, out[j + 2] = v.z, out[j + 3] = v.w;
    }
  }
}

// Weight and bias where they are one number for a whole group, else whatever.
template <class Real>
struct GroupAffine {
  Real weight, bias;
};

template <class T, class Real>
__device__ inline GroupAffine<Real> run_affine(const RowsArgs<Real>& a, int64_t i) {
  return {a.weight ? load_parameter<T>(a.weight, a.weight_in_storage, i) : Real(1),
          a.bias ? load_parameter<T>(a.bias, a.bias_in_storage, i) : Real(0)};
}
template <class T, class Real>
__device__ inline GroupAffine<Real> group_affine(const RowsArgs<Real>& a, const GroupPlace& g) {
  return a.affine == Affine::kPerGroup ? run_affine<T>(a, g.inner) : GroupAffine<Real>{Real(1), Real(0)};
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
