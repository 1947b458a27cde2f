// Loads and stores: a thread reads, computes and writes chunks, 16 bytes of storage (float64: 32) as numbers of the compute type.
#pragma once

#include "runtime.cuh"

namespace normnorm {
namespace cuda {
namespace {

template <class T>
struct StorageTraits {
  using Real = float;
  static constexpr int kChunk = 16 / sizeof(T);
};
template <>
struct StorageTraits<double> {  // four elements, half of those that share a Philox counter
  using Real = double;
  static constexpr int kChunk = 4;
};
template <class T>
using RealOf = typename StorageTraits<T>::Real;
template <class T>
constexpr int kChunkOf = StorageTraits<T>::kChunk;

__device__ inline float to_real(float v) { return v; }
__device__ inline double to_real(double v) { return v; }
__device__ inline float to_real(__half v) { return __half2float(v); }
__device__ inline float to_real(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ inline T from_real(RealOf<T> v);
template <>
__device__ inline float from_real<float>(float v) { return v; }
template <>
__device__ inline double from_real<double>(double v) { return v; }
template <>
__device__ inline __half from_real<__half>(float v) { return __float2half_rn(v); }
template <>
__device__ inline __nv_bfloat16 from_real<__nv_bfloat16>(float v) { return __float2bfloat16_rn(v); }

__device__ inline void unpack(uint32_t word, float* out, float) { memcpy(out, &word, 4); }
__device__ inline void unpack(uint32_t word, float* out, __nv_bfloat16) {
  const uint32_t low = word << 16, high = word & 0xffff0000u;  // a bf16 is the upper half of a float
  memcpy(out, &low, 4);
  memcpy(out + 1, &high, 4);
}
__device__ inline void unpack(uint32_t word, float* out, __half) {
  __half2 pair;
  memcpy(&pair, &word, 4);
  const float2 both = __half22float2(pair);
  out[0] = both.x, out[1] = both.y;
}
__device__ inline uint32_t pack(const float* in, float) {
  uint32_t word;
  memcpy(&word, in, 4);
  return word;
}
__device__ inline uint32_t pack(const float* in, __nv_bfloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(in[0], in[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}
__device__ inline uint32_t pack(const float* in, __half) {
  const __half2 pair = __floats2half2_rn(in[0], in[1]);
  uint32_t word;
  memcpy(&word, &pair, 4);
  return word;
}

template <class T>
__device__ __forceinline__ void unpack_chunk(uint4 raw, float (&out)[kChunkOf<T>]) {
  constexpr int per_word = kChunkOf<T> / 4;
  unpack(raw.x, out, T{});
  unpack(raw.y, out + per_word, T{});
  unpack(raw.z, out + 2 * per_word, T{});
  unpack(raw.w, out + 3 * per_word, T{});
}

template <class T>
__device__ __forceinline__ uint4 pack_chunk(const float (&in)[kChunkOf<T>]) {
  constexpr int per_word = kChunkOf<T> / 4;
  uint4 raw;
  raw.x = pack(in, T{});
  raw.y = pack(in + per_word, T{});
  raw.z = pack(in + 2 * per_word, T{});
  raw.w = pack(in + 3 * per_word, T{});
  return raw;
}

// Rounds numbers as a store and a load do.
template <class T, int N>
__device__ __forceinline__ void round_chunk(RealOf<T> (&x)[N]) {
  if constexpr (sizeof(T) < sizeof(RealOf<T>)) unpack_chunk<T>(pack_chunk<T>(x), x);
}

// A whole chunk in one 128-bit access; p is aligned to 16 bytes.
template <class T>
__device__ inline void load_chunk(const T* p, float (&out)[kChunkOf<T>]) {
  unpack_chunk<T>(load_global(p), out);
}
template <class T>
__device__ inline void store_chunk(T* p, const float (&in)[kChunkOf<T>]) {
  store_global(p, pack_chunk<T>(in));
}
// float64 goes element by element; it has no vectorized path.
__device__ inline void load_chunk(const double* p, double (&out)[4]) {
  for (int j = 0; j < 4; ++j) out[j] = p[j];
}
__device__ inline void store_chunk(double* p, const double (&in)[4]) {
  for (int j = 0; j < 4; ++j) p[j] = in[j];
}

// Where a chunk is from the start of its load to its use.
struct InRegisters {
  uint4 raw;
  __device__ __forceinline__ void load(const void* p) { raw = load_global(p); }
  __device__ __forceinline__ void set(uint4 v) { raw = v; }
  __device__ __forceinline__ uint4 get() const { return raw; }
};
struct InShared {
  uint4* at;
  __device__ __forceinline__ void load(const void* p) { copy_async(at, p); }
  __device__ __forceinline__ void set(uint4 v) { *at = v; }
  // memcpy: the kernels store numbers of other types to the same memory
  __device__ __forceinline__ uint4 get() const {
    uint4 raw;
    memcpy(&raw, __builtin_assume_aligned(at, 16), 16);
    return raw;
  }
};

// A chunk loaded in two steps, so that several loads are in flight at once: the layout's fetch() starts the load, and its
// values() converts what was loaded. kLate: values() loads too, for ragged chunks and where registers are short.
template <class T, bool kLate, class Place = InRegisters>
struct Fetched : Place {
  __device__ __forceinline__ void place(uint4* where) { this->at = where; }
};
template <class T, class Place>
struct Fetched<T, true, Place> {
  __device__ __forceinline__ void place(uint4*) {}
};

template <size_t kChunks>
__device__ __forceinline__ uint4* shared_ring() {
  __shared__ uint4 ring[kChunks];
  return ring;
}

// f(i, raw) for i = first, first + step ... below end, by the kThreads threads of a block. load(i, raw) starts the loads of f,
// kAhead steps before it, into a ring in shared memory: loads into registers would be waited for together, because the compiler
// gives them one scoreboard. Late members of Raw are loaded by f.
template <class Raw, int kThreads, int kAhead, class Load, class F>
__device__ __forceinline__ void each_ahead(uint32_t first, uint32_t end, uint32_t step, Load load, F f) {
  Raw raw;
  if constexpr (Raw::kChunks == 0) {
#pragma unroll 1
    for (uint32_t i = first; i < end; i += step) load(i, raw), f(i, raw);
  } else {
    constexpr uint32_t kStep = Raw::kChunks * kThreads * sizeof(uint4), kLast = kAhead * kStep;  // bytes
    char* ring = reinterpret_cast<char*>(shared_ring<(kLast + kStep) / sizeof(uint4)>());
    const uint32_t own = opaque(threadIdx.x * sizeof(uint4));
    const auto start = [&](uint32_t i, uint32_t to) {
      raw.place(reinterpret_cast<uint4*>(ring + to), kThreads);
      if (i < end) load(i, raw);
      commit_copies();
    };
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) start(first + k * step, own + k * kStep);
    uint32_t now = own, used = own + kLast;
#pragma unroll 1
    for (uint32_t i = first; i < end; i += step) {
      wait_for_copies<kAhead - 1>();
      start(i + kAhead * step, used);
      raw.place(reinterpret_cast<uint4*>(ring + now), kThreads);
      f(i, raw);
      used = now;
      now = now == own + kLast ? own : now + kStep;
    }
  }
}

// Elements [lo, hi) of a chunk; the others are zeros that are neither loaded nor stored.
struct Span {
  int lo, hi;
  __device__ bool has(int j) const { return j >= lo && j < hi; }
  __device__ int count() const { return hi > lo ? hi - lo : 0; }
};

template <class T>
__device__ inline void load_span(const T* p, Span span, RealOf<T> (&out)[kChunkOf<T>]) {
#pragma unroll
  for (int j = 0; j < kChunkOf<T>; ++j) out[j] = span.has(j) ? to_real(p[j]) : RealOf<T>(0);
}
template <class T>
__device__ inline void store_span(T* p, Span span, const RealOf<T> (&in)[kChunkOf<T>]) {
#pragma unroll
  for (int j = 0; j < kChunkOf<T>; ++j)
    if (span.has(j)) p[j] = from_real<T>(in[j]);
}

// Sums pairwise: short dependency chains, and the sum of equal numbers is exact.
template <int N, class Real>
__device__ inline Real chunk_sum(const Real (&x)[N]) {
  Real part[N / 2];
#pragma unroll
  for (int j = 0; j < N / 2; ++j) part[j] = x[j] + x[j + N / 2];
  if constexpr (N == 2) return part[0];
  else return chunk_sum(part);
}

// An element of a parameter in the compute type or the storage type.
template <class T>
__device__ inline RealOf<T> load_parameter(const void* data, bool in_storage_type, int64_t i) {
  return in_storage_type ? to_real(static_cast<const T*>(data)[i]) : static_cast<const RealOf<T>*>(data)[i];
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
