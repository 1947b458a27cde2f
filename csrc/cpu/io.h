// Reads and writes of stored elements: float32, float64, bfloat16, float16.
#pragma once

#include "params.h"
#include "simd.h"

namespace normnorm {
namespace {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

typedef uint16_t VHalfBits __attribute__((vector_size(kVectorBytes / 2)));

NN_HD VFloat widen(VHalfBits bits, BFloat16) {
  return bit_cast<VFloat>(VUInt32(__builtin_convertvector(bits, VUInt32) << 16));
}

NN_HD VHalfBits narrow(VFloat v, BFloat16) {
  const VUInt32 bits = bit_cast<VUInt32>(v);
  const VUInt32 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const VUInt32 quiet_nan = (bits >> 16) | 0x40u;
  return __builtin_convertvector(v == v ? rounded : quiet_nan, VHalfBits);
}

NN_HD VFloat widen(VHalfBits bits, Float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)bits);
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)bits);
#else
  const VUInt32 w = __builtin_convertvector(bits, VUInt32);
  const VUInt32 sign = (w & 0x8000u) << 16;
  const VUInt32 rest = (w & 0x7fffu) << 13;
  // multiplying by 2^112 corrects the exponent's bias and normalises subnormals; exponent 31 is infinity or NaN
  const VUInt32 finite = bit_cast<VUInt32>(VFloat(bit_cast<VFloat>(rest) * 5.192296858534828e+33f));
  return bit_cast<VFloat>(VUInt32(sign | ((w & 0x7c00u) == 0x7c00u ? (rest | 0x7f800000u) : finite)));
#endif
}

NN_HD VHalfBits narrow(VFloat v, Float16) {
#if defined(__AVX512F__)
  return (VHalfBits)_mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__) && defined(__F16C__)
  return (VHalfBits)_mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT);
#else
  const VUInt32 bits = bit_cast<VUInt32>(v);
  const VUInt32 sign = (bits >> 16) & 0x8000u;
  const VUInt32 rest = bits & 0x7fffffffu;
  const VUInt32 normal = (rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13;  // rebias by -112, round to even
  // below 2^-14: the sum with 1/2 has the rounded subnormal in its low mantissa bits
  const VUInt32 subnormal = bit_cast<VUInt32>(VFloat(bit_cast<VFloat>(rest) + 0.5f)) - 0x3f000000u;
  const VUInt32 infinite = rest > 0x7f800000u ? (0x7e00u | (rest >> 13 & 0x3ffu)) : 0x7c00u + (rest & 0u);
  const VUInt32 finite = rest < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(VUInt32(sign | (rest >= 0x477ff000u ? infinite : finite)), VHalfBits);
#endif
}

// Converts a run of half-precision elements to and from float32.
template <class Half>
inline void widen_run(const Half* from, float* to, int64_t count) {
  VHalfBits bits;
  for (; count >= kLanes<VFloat>; from += kLanes<VFloat>, to += kLanes<VFloat>, count -= kLanes<VFloat>) {
    memcpy(&bits, from, sizeof(bits));
    store_dense<VFloat>(to, widen(bits, Half{}));
  }
  if (!count) return;
  bits = VHalfBits{};
  memcpy(&bits, from, size_t(count) * sizeof(Half));
  const VFloat v = widen(bits, Half{});
  memcpy(to, &v, size_t(count) * sizeof(float));
}

template <class Half>
inline void narrow_run(const float* from, Half* to, int64_t count) {
  VHalfBits bits;
  for (; count >= kLanes<VFloat>; from += kLanes<VFloat>, to += kLanes<VFloat>, count -= kLanes<VFloat>) {
    bits = narrow(load_dense<VFloat>(from), Half{});
    memcpy(to, &bits, sizeof(bits));
  }
  if (!count) return;
  VFloat v{};
  memcpy(&v, from, size_t(count) * sizeof(float));
  bits = narrow(v, Half{});
  memcpy(to, &bits, size_t(count) * sizeof(Half));
}

// Kernels compute in T. Half types are converted block by block, in the first-level cache, which is cheap and saves a
// second set of kernels.
NN_HD bool stored_as_half(Storage s) {
  return s == Storage::kBFloat16 || s == Storage::kFloat16;
}

// Runs of a few elements are copied faster without a call.
template <class T>
NN_HD void copy_run(const T* from, T* to, int64_t count) {
  for_vectors<VectorOf<T>>(count, [&](auto partial, int64_t first, int64_t steps, int lanes) {
    for (int64_t i = first; i < first + steps * kLanes<VectorOf<T>>; i += kLanes<VectorOf<T>>)
      write<partial.value, VectorOf<T>>(to + i, read<partial.value, VectorOf<T>>(from + i, lanes), lanes);
  });
}

// Stored elements to and from the compute dtype T.
template <class T>
inline void load_run(Storage storage, const void* data, int64_t offset, T* to, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16)
      return widen_run(static_cast<const BFloat16*>(data) + offset, to, count);
    if (storage == Storage::kFloat16)
      return widen_run(static_cast<const Float16*>(data) + offset, to, count);
  }
  copy_run(static_cast<const T*>(data) + offset, to, count);
}

template <class T>
inline void store_run(Storage storage, void* data, int64_t offset, const T* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16)
      return narrow_run(from, static_cast<BFloat16*>(data) + offset, count);
    if (storage == Storage::kFloat16)
      return narrow_run(from, static_cast<Float16*>(data) + offset, count);
  }
  copy_run(from, static_cast<T*>(data) + offset, count);
}

}  // namespace
}  // namespace normnorm
