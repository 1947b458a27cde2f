// The rows layout: groups of runs of neighbouring elements, divided among threads in chunks.
//
// Two modes. Aligned: every run starts on a chunk boundary and has whole chunks, in every tensor. Ragged: a run may begin
// and end within a chunk. Chunks then start at multiples of their size, counted in memory where all tensors have the same
// boundaries, and else in the order of the noise. In both modes a chunk begins at a multiple of its size in that order.
#pragma once

#include "../math/device_math.h"
#include "../common/stats.h"
#include "epilogue.cuh"
#include "io.cuh"
#include "params.h"

namespace normnorm {
namespace cuda {
namespace {

// Division of numbers below 2^31 by a launch constant, as a product and a shift (Granlund and Montgomery 1994).
struct FastDivide {
  uint32_t divisor = 1, factor = 0x80000001u, shift = 31;
  FastDivide() = default;
  explicit FastDivide(uint32_t d) : divisor(d) {
    while ((uint64_t(1) << (shift - 31)) < d) ++shift;
    factor = uint32_t((uint64_t(1) << shift) / d + 1);
  }
  // For numbers that are all below the divisor: the quotient is 0 without a branch.
  static FastDivide always_zero(uint32_t d) {
    FastDivide f(d);
    f.factor = 0;
    return f;
  }
  __device__ uint32_t quotient(uint32_t n) const { return uint32_t(uint64_t(n) * factor >> shift); }
};

// A tensor's strides, and in aligned mode the chunks between the end of one run and the start of the next, modulo 2^32.
struct ChunkStrides : Strides {
  uint32_t gap = 0;
};

// The tensors of fused operations (params.h); null data where there is none.
struct FusedTensor {
  void* data;
  ChunkStrides at;
};
struct FusedTensors {
  FusedTensor residual, addend, sum, activated, grad_sum;
  Activation activation;
};

// The types of a weight and a bias of each element that are both given; else kOther.
enum class Parameters { kOther, kStorage, kCompute };

// The parameters of every kernel of a pass; those of the streaming kernels and of the columns layout add to them.
template <class Real>
struct KernelArgs {
  // geometry
  int64_t length;  // of a run
  uint32_t groups, runs;
  FastDivide inner, chunks_per_run;
  uint32_t chunks, shared_chunks;  // of a group; of a thread, in shared memory
  bool wide;        // ragged: whole chunks are aligned to 16 bytes
  // tensors
  const void* input;
  const void* grad;
  void* output;
  ChunkStrides at_input, at_grad, at_output, at_noise;
  Strides chunk_origin;  // ragged: a chunk starts where chunk_base plus these strides is a multiple of its size
  int64_t chunk_base;
  Real* stats;  // (kStatRows, groups)
  // affine map
  const void *weight, *bias;
  bool weight_in_storage, bias_in_storage;
  Parameters parameters;
  Affine affine;
  // noise
  const int64_t* seed;
  uint32_t stream;
  bool noise, given_scale, frozen;
  // numbers
  Real noise_train, inverse_count;
  Settings<Real> settings;
  double inverse_count_double;
  // backward: partial gradients of the parameters, (partials, elements of the parameter); null where not wanted
  Real *weight_partials, *bias_partials;
  FusedTensors fused;
};

// A group's offsets in the tensors, in elements.
struct GroupPlace {
  int64_t outer, inner, input, grad, output, noise, origin;
};

template <class Real>
__device__ inline int64_t group_offset(const Strides& s, int64_t outer, int64_t inner) {
  return outer * s.outer + inner * s.inner;
}

template <class Real>
__device__ inline GroupPlace locate_group(const KernelArgs<Real>& a, uint32_t group) {
  const uint32_t outer = a.inner.quotient(group);
  const uint32_t inner = group - outer * a.inner.divisor;
  return {outer, inner, group_offset<Real>(a.at_input, outer, inner), group_offset<Real>(a.at_grad, outer, inner),
          group_offset<Real>(a.at_output, outer, inner), group_offset<Real>(a.at_noise, outer, inner),
          a.chunk_base + group_offset<Real>(a.chunk_origin, outer, inner)};
}

// A chunk's place in its group: its element j is element first + j of the run.
struct ChunkPlace {
  uint32_t chunk, run;
  int64_t first;
  Span span;
  bool whole;
};

template <bool kRagged, int N, class Real>
__device__ inline ChunkPlace locate_chunk(const KernelArgs<Real>& a, const GroupPlace& g, uint32_t chunk) {
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

// The address of a chunk in a tensor. Aligned: 32 bits count the chunks of a group, which reaches 64 GiB.
template <class T, bool kRagged>
__device__ __forceinline__ const T* chunk_address(const void* tensor, int64_t group, const ChunkStrides& s,
                                                 const ChunkPlace& c) {
  const T* p = static_cast<const T*>(tensor) + group;
  if constexpr (kRagged) return p + (int64_t(c.run) * s.run + c.first);
  p = opaque_address(p);  // else the compiler adds the offset to `group` first, in four instructions a chunk instead of two
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(p) + uint64_t(c.chunk + c.run * s.gap) * 16);
}

template <class T, bool kRagged>
__device__ __forceinline__ void read_chunk(const void* tensor, int64_t group, const ChunkStrides& s, const ChunkPlace& c,
                                           RealOf<T> (&out)[kChunkOf<T>]) {
  const T* p = chunk_address<T, kRagged>(tensor, group, s, c);
  if (!kRagged || c.whole) load_chunk(p, out);
  else load_span(p, c.span, out);
}

template <class T, bool kRagged, bool kLate, class Place>
__device__ __forceinline__ void fetch(const void* tensor, int64_t group, const ChunkStrides& s, const ChunkPlace& c,
                                      Fetched<T, kLate, Place>& out) {
  if constexpr (!kLate) out.load(chunk_address<T, kRagged>(tensor, group, s, c));
}
template <class T, bool kRagged, bool kLate, class Place>
__device__ __forceinline__ void values(const void* tensor, int64_t group, const ChunkStrides& s, const ChunkPlace& c,
                                       const Fetched<T, kLate, Place>& fetched, RealOf<T> (&out)[kChunkOf<T>]) {
  if constexpr (kLate) read_chunk<T, kRagged>(tensor, group, s, c, out);
  else unpack_chunk<T>(fetched.get(), out);
}

template <class T, bool kRagged>
__device__ __forceinline__ void write_chunk(void* tensor, int64_t group, const ChunkStrides& s, const ChunkPlace& c,
                                            const RealOf<T> (&in)[kChunkOf<T>]) {
  T* p = const_cast<T*>(chunk_address<T, kRagged>(tensor, group, s, c));
  if (!kRagged || c.whole) store_chunk(p, in);
  else store_span(p, c.span, in);
}

// The `at` of epilogue.cuh: a chunk's place in any tensor.
template <class T, bool kRagged>
struct ChunkAt {
  const GroupPlace& group;
  const ChunkPlace& chunk;

  template <bool kLate, class Place>
  __device__ __forceinline__ void fetch(const FusedTensor& t, Fetched<T, kLate, Place>& out) const {
    cuda::fetch<T, kRagged>(t.data, offset(t), t.at, chunk, out);
  }
  template <bool kLate, class Place>
  __device__ __forceinline__ void values(const FusedTensor& t, const Fetched<T, kLate, Place>& fetched,
                                         RealOf<T> (&out)[kChunkOf<T>]) const {
    cuda::values<T, kRagged>(t.data, offset(t), t.at, chunk, fetched, out);
  }
  __device__ __forceinline__ void write(const FusedTensor& t, const RealOf<T> (&in)[kChunkOf<T>]) const {
    write_chunk<T, kRagged>(t.data, offset(t), t.at, chunk, in);
  }

 private:
  __device__ int64_t offset(const FusedTensor& t) const {
    return group_offset<RealOf<T>>(t.at, group.outer, group.inner);
  }
};

// A chunk's number in the order of the noise: its first element's position, divided by the chunk's size.
template <int N, bool kRagged, class Real>
__device__ __forceinline__ uint64_t noise_chunk(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c) {
  if constexpr (kRagged) return uint64_t(g.noise + int64_t(c.run) * a.at_noise.run + c.first) / N;
  else return uint64_t(g.noise) / N + (c.chunk + c.run * a.at_noise.gap);
}

// f(j, pair) for the pairs of normals of a chunk's elements j and j + 1. A chunk of eight elements is those of a counter,
// one of four their first or second half.
template <int N, bool kRagged, class Real, class F>
__device__ __forceinline__ void each_normal_pair(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                                 const PhiloxSchedule& keys, F f) {
  static_assert(N == 4 || N == 8, "a chunk is a counter or half of one");
  const uint64_t chunk = noise_chunk<N, kRagged>(a, g, c);
  PhiloxWords w = noise_words(keys, a.stream, chunk / (8 / N));
  if (N == 4 && chunk % 2 == 1) w = {{w.word[2], w.word[3], w.word[0], w.word[1]}};
  PolarPair<Real> z[N / 2];  // all before the first use: interleaved they take two instructions an element more
#pragma unroll
  for (int i = 0; i < N / 2; ++i) z[i] = polar_pair(w.word[i], w.word[(i + 1) % 4], Real());
#pragma unroll
  for (int i = 0; i < N / 2; ++i) f(2 * i, z[i]);
}

// x += noise z; noise includes kNormalUnit.
template <bool kRagged, int N, class Real>
__device__ __forceinline__ void add_noise(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                          const PhiloxSchedule& keys, Real noise, Real (&x)[N]) {
  each_normal_pair<N, kRagged>(a, g, c, keys, [&](int j, const PolarPair<Real>& z) {
    const Real radius = noise * z.radius;
    x[j] = radius * z.cos + x[j];
    x[j + 1] = radius * z.sin + x[j + 1];
  });
}

// The sum of g z, without kNormalUnit.
template <bool kRagged, int N, class Real>
__device__ __forceinline__ Real noise_product(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                              const PhiloxSchedule& keys, const Real (&grad)[N]) {
  Real sum = 0;
  each_normal_pair<N, kRagged>(a, g, c, keys, [&](int j, const PolarPair<Real>& z) {
    sum += z.radius * (grad[j] * z.cos + grad[j + 1] * z.sin);
  });
  return sum;
}

// The standard normals, without kNormalUnit, of a chunk that may begin within a counter. They are those of N / 2 + 1 pairs,
// or without the last where the chunk begins with a pair.
template <int N, class Real>
__device__ inline void unaligned_normals(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                         const PhiloxSchedule& keys, Real (&z)[N]) {
  const uint64_t position = uint64_t(g.noise + int64_t(c.run) * a.at_noise.run + c.first), first = position / 2;
  const bool odd = position % 2 == 1;
  PhiloxWords w = noise_words(keys, a.stream, first / 4);
  // the words of the next pair come first
  if (first & 1) w = {{w.word[1], w.word[2], w.word[3], w.word[0]}};
  if (first & 2) w = {{w.word[2], w.word[3], w.word[0], w.word[1]}};
#pragma unroll
  for (int i = 0; i <= N / 2; ++i) {
    if (i == N / 2 && !odd) break;
    if (i > 0 && (first + i) % 4 == 0) w = noise_words(keys, a.stream, (first + i) / 4);
    const PolarPair<Real> pair = polar_pair(w.word[0], w.word[1], Real());
    w = {{w.word[1], w.word[2], w.word[3], w.word[0]}};
    const Real one = pair.radius * pair.cos, other = pair.radius * pair.sin;
    if (i > 0) z[2 * i - 1] = odd ? one : z[2 * i - 1];
    if (i < N / 2) z[2 * i] = odd ? other : one, z[2 * i + 1] = other;
  }
}

// The weight (or bias) of each element of a chunk, where it varies along the run (kPerElement).
template <class T, bool kRagged, class Real>
__device__ __forceinline__ void element_parameters(const void* data, bool in_storage, const ChunkPlace& c,
                                                   Real (&out)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if constexpr (kRagged) {
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

// Weight and bias where they are the same for a whole group; else 1 and 0.
template <class Real>
struct GroupAffine {
  Real weight, bias;
};

template <class T, class Real>
__device__ inline GroupAffine<Real> run_affine(const KernelArgs<Real>& a, int64_t i) {
  return {a.weight ? load_parameter<T>(a.weight, a.weight_in_storage, i) : Real(1),
          a.bias ? load_parameter<T>(a.bias, a.bias_in_storage, i) : Real(0)};
}
template <class T, class Real>
__device__ inline GroupAffine<Real> group_affine(const KernelArgs<Real>& a, const GroupPlace& g) {
  return a.affine == Affine::kPerGroup ? run_affine<T>(a, g.inner) : GroupAffine<Real>{Real(1), Real(0)};
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
