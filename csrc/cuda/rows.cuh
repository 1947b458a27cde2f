// The rows walk: groups made of runs of neighbouring elements, dealt out to threads in chunks.
//
// Two modes. Aligned: every run starts on a chunk boundary and has whole chunks, in every tensor. Ragged: chunks still
// start at multiples of their size, counted in memory where all tensors agree about it and else in the order of the
// noise, so that a run begins and ends within a chunk. Either way one Philox counter never serves two chunks.
#pragma once

#include "../math/device_math.h"
#include "../common/stats.h"
#include "joined.cuh"
#include "problem.h"
#include "storage.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Division of numbers below 2^31 by a number known before the launch: a product and a shift (Granlund and Montgomery
// 1994).
struct FastDivide {
  uint32_t divisor = 1, factor = 0x80000001u, shift = 31;
  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << (shift - 31)) < d) ++shift;
    factor = uint32_t((uint64_t(1) << shift) / d + 1);
  }
  // Where every number is below the divisor, which spares whoever divides a question.
  static FastDivide always_zero(uint32_t d) {
    FastDivide f(d);
    f.factor = 0;
    return f;
  }
  __device__ uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n) * factor >> shift); }
};

// A tensor's strides, and for aligned walks how many chunks (of the noise: counters) lie between the end of one run and
// the start of the next, modulo 2^32.
struct Walk : Strides {
  uint32_t gap = 0;
};

// What joined kernels read and write besides (problem.h); null data where there is none.
struct JoinedTensor {
  void* data;
  Walk at;
};
struct Joined {
  JoinedTensor residual, addend, sum, activated, grad_sum;
  bool relu;
};

template <class Real>
struct RowsArgs {
  int64_t length;
  uint32_t groups, runs;
  FastDivide inner, chunks_per_run;
  uint32_t chunks;  // of a group
  bool wide;
  const void* input;
  const void* grad;
  void* output;
  Walk at_input, at_grad, at_output, at_noise;
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
  double inverse_count_double;
  int order;
  // backward: where sums for the parameters go, (parts, elements of the parameter); null where not wanted
  Real *weight_part, *bias_part;
  Joined joined;
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
  uint32_t chunk, run;
  int64_t first;
  Span span;
  bool whole;
};

template <bool kRagged, int N, class Real>
__device__ inline ChunkPlace locate_chunk(const RowsArgs<Real>& a, const GroupPlace& g, uint32_t chunk) {
  const uint32_t run = a.chunks_per_run.quotient(chunk);
  const int64_t first = int64_t(chunk - run * a.chunks_per_run.divisor) * N;
  if constexpr (!kRagged) {
    return {chunk, run, first, {0, N}, true};
  } else {
    const int64_t start = first - ((g.origin + int64_t(run) * a.chunk_origin.run) & (N - 1));
    const int lo = start < 0 ? int(-start) : 0;
    const int64_t left = a.length - start;
    const int hi = left < N ? int(left) : N;
    return {chunk, run, start, {lo, hi}, lo == 0 && hi == N && a.wide};
  }
}

// Where a chunk lies in a tensor. Aligned: 32 bits count chunks within a group, as far as 64 GiB.
template <class T, bool kRagged>
__device__ __forceinline__ const T* chunk_address(const void* tensor, int64_t group, const Walk& s, const ChunkPlace& c) {
  const T* p = static_cast<const T*>(tensor) + group;
  if constexpr (kRagged) return p + (int64_t(c.run) * s.run + c.first);
#if defined(__CUDA_ARCH__)
  asm("" : "+l"(p));  // or the compiler adds the offset to `group` first, and takes four instructions a chunk instead of two
#endif
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + uint64_t(c.chunk + c.run * s.gap) * 16);
}

template <class T, bool kRagged>
__device__ __forceinline__ void read_chunk(const void* tensor, int64_t group, const Walk& s, const ChunkPlace& c,
                                           RealOf<T> (&out)[kChunkOf<T>]) {
  const T* p = chunk_address<T, kRagged>(tensor, group, s, c);
  if (!kRagged || c.whole) load_chunk(p, out);
  else load_span(p, c.span, out);
}

template <class T, bool kRagged, bool kLate>  // kLate follows from `out`
__device__ __forceinline__ void fetch(const void* tensor, int64_t group, const Walk& s, const ChunkPlace& c,
                                      Fetched<T, kLate>& out) {
  if constexpr (!kLate) out.raw = load_packed(chunk_address<T, kRagged>(tensor, group, s, c));
}
template <class T, bool kRagged, bool kLate>
__device__ __forceinline__ void values(const void* tensor, int64_t group, const Walk& s, const ChunkPlace& c,
                                       const Fetched<T, kLate>& fetched, RealOf<T> (&out)[kChunkOf<T>]) {
  if constexpr (kLate) read_chunk<T, kRagged>(tensor, group, s, c, out);
  else unpack_chunk<T>(fetched.raw, out);
}

template <class T, bool kRagged>
__device__ __forceinline__ void write_chunk(void* tensor, int64_t group, const Walk& s, const ChunkPlace& c,
                                            const RealOf<T> (&in)[kChunkOf<T>]) {
  T* p = const_cast<T*>(chunk_address<T, kRagged>(tensor, group, s, c));
  if (!kRagged || c.whole) store_chunk(p, in);
  else store_span(p, c.span, in);
}

// A chunk's place in the tensors of joined kernels, `at` of joined.cuh.
template <class T, bool kRagged>
struct ChunkAt {
  const GroupPlace& group;
  const ChunkPlace& chunk;

  template <bool kLate>
  __device__ __forceinline__ void fetch(const JoinedTensor& t, Fetched<T, kLate>& out) const {
    cuda::fetch<T, kRagged>(t.data, offset(t), t.at, chunk, out);
  }
  template <bool kLate>
  __device__ __forceinline__ void values(const JoinedTensor& t, const Fetched<T, kLate>& fetched,
                                         RealOf<T> (&out)[kChunkOf<T>]) const {
    cuda::values<T, kRagged>(t.data, offset(t), t.at, chunk, fetched, out);
  }
  __device__ __forceinline__ void write(const JoinedTensor& t, const RealOf<T> (&in)[kChunkOf<T>]) const {
    write_chunk<T, kRagged>(t.data, offset(t), t.at, chunk, in);
  }

 private:
  __device__ int64_t offset(const JoinedTensor& t) const {
    return group_offset<RealOf<T>>(t.at, group.outer, group.inner);
  }
};

// The counter of the noise that serves a chunk's first element.
template <int N, bool kRagged, class Real>
__device__ __forceinline__ uint64_t chunk_quad(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c) {
  if constexpr (kRagged) return uint64_t(g.noise + int64_t(c.run) * a.at_noise.run + c.first) / 4;
  else return uint64_t(g.noise) / 4 + (c.chunk * (N / 4) + c.run * a.at_noise.gap);
}

// f(j, pair) for the pairs of normals of a chunk's elements j and j + 1; the chunk's first element is served by a
// counter's first word.
template <int N, bool kRagged, class Real, class F>
__device__ __forceinline__ void each_normal_pair(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                                 const PhiloxSchedule& keys, F f) {
  const uint64_t quad = chunk_quad<N, kRagged>(a, g, c);
#pragma unroll
  for (int j = 0; j < N; j += 4) {
    const QuadNormals<Real> z = quad_normals<Real>(keys, a.stream, quad + uint64_t(j / 4));
    f(j, z.even);
    f(j + 2, z.odd);
  }
}

// x + noise z, where noise lacks kNormalUnit.
template <bool kRagged, int N, class Real>
__device__ __forceinline__ void add_noise(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                          const PhiloxSchedule& keys, Real noise, Real (&x)[N]) {
  each_normal_pair<N, kRagged>(a, g, c, keys, [&](int j, const PolarPair<Real>& z) {
    const Real radius = noise * z.radius;
    x[j] = radius * z.cos + x[j];
    x[j + 1] = radius * z.sin + x[j + 1];
  });
}

// The sum of g z, without kNormalUnit.
template <bool kRagged, int N, class Real>
__device__ __forceinline__ Real noise_product(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                              const PhiloxSchedule& keys, const Real (&grad)[N]) {
  Real sum = 0;
  each_normal_pair<N, kRagged>(a, g, c, keys, [&](int j, const PolarPair<Real>& z) {
    sum += z.radius * (grad[j] * z.cos + grad[j + 1] * z.sin);
  });
  return sum;
}

// The standard normals of a chunk that begins anywhere within a counter, without kNormalUnit.
template <int N, class Real>
__device__ inline void unaligned_normals(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                         const PhiloxSchedule& keys, Real (&z)[N]) {
  const int64_t position = g.noise + int64_t(c.run) * a.at_noise.run + c.first;
  QuadNormals<Real> quad;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int word = int(position + j) & 3;
    if (j == 0 || word == 0) quad = quad_normals<Real>(keys, a.stream, uint64_t(position + j) / 4);
    const PolarPair<Real>& pair = word & 2 ? quad.odd : quad.even;
    z[j] = pair.radius * (word & 1 ? pair.sin : pair.cos);
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
