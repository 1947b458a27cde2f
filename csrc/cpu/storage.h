// How tensors are stored: float32, float64, bfloat16, float16; and how a vector of lanes is read and written.
#pragma once

#include "problem.h"
#include "vector.h"

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
  // multiplying by 2^112 moves the exponent bias and normalises subnormals; 31 in the exponent is infinity or
  // NaN
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
  // below 2^-14 the sum with 1/2 leaves the rounded subnormal in the low mantissa bits
  const VUInt32 subnormal = bit_cast<VUInt32>(VFloat(bit_cast<VFloat>(rest) + 0.5f)) - 0x3f000000u;
  const VUInt32 infinite = rest > 0x7f800000u ? (0x7e00u | (rest >> 13 & 0x3ffu)) : 0x7c00u + (rest & 0u);
  const VUInt32 finite = rest < 0x38800000u ? subnormal : normal;
  return __builtin_convertvector(VUInt32(sign | (rest >= 0x477ff000u ? infinite : finite)), VHalfBits);
#endif
}

template <class V>
NN_HD V load(const ScalarOf<V>* p) {
  return load_dense<V>(p);
}
template <class V>
NN_HD void store(ScalarOf<V>* p, V v) {
  store_dense<V>(p, v);
}

// The first `count` lanes; the others are zero and are never read from or written to memory.
template <class V>
NN_HD V load_some(const ScalarOf<V>* p, int count) {
#if defined(__AVX512F__)
  if constexpr (HasFloatLanes<V>::value) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
#endif
  ScalarOf<V> lanes[kLanes<V>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load_dense<V>(lanes);
}
template <class V>
NN_HD void store_some(ScalarOf<V>* p, V v, int count) {
#if defined(__AVX512F__)
  if constexpr (HasFloatLanes<V>::value) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), v);
#endif
  ScalarOf<V> lanes[kLanes<V>];
  store_dense<V>(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// One spelling for whole and partial vectors: kPartial vectors hold `lanes` elements.
template <bool kPartial, class V>
NN_HD V read(const ScalarOf<V>* p, int lanes) {
  if constexpr (kPartial)
    return load_some<V>(p, lanes);
  else
    return load_dense<V>(p);
}
template <bool kPartial, class V>
NN_HD void write(ScalarOf<V>* p, V v, int lanes) {
  if constexpr (kPartial)
    store_some<V>(p, v, lanes);
  else
    store_dense<V>(p, v);
}

// A run of half-precision elements to and from float32.
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

// Stored elements to and from the compute dtype T. Kernels compute in T alone; half types are converted a
// block at a time, in the first-level cache, which costs less than a second set of kernels would.
NN_HD bool stored_as_half(Storage s) {
  return s == Storage::kBFloat16 || s == Storage::kFloat16;
}

template <class T>
inline void load_run(Storage storage, const void* data, int64_t offset, T* to, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16)
      return widen_run(static_cast<const BFloat16*>(data) + offset, to, count);
    if (storage == Storage::kFloat16)
      return widen_run(static_cast<const Float16*>(data) + offset, to, count);
  }
  memcpy(to, static_cast<const T*>(data) + offset, size_t(count) * sizeof(T));
}

template <class T>
inline void store_run(Storage storage, void* data, int64_t offset, const T* from, int64_t count) {
  if constexpr (sizeof(T) == 4) {
    if (storage == Storage::kBFloat16)
      return narrow_run(from, static_cast<BFloat16*>(data) + offset, count);
    if (storage == Storage::kFloat16)
      return narrow_run(from, static_cast<Float16*>(data) + offset, count);
  }
  memcpy(static_cast<T*>(data) + offset, from, size_t(count) * sizeof(T));
}

}  // namespace
}  // namespace normnorm
