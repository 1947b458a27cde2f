// SIMD vectors of float or double, as wide as those of the instruction set this file is compiled for.
//
// They are the compiler's vector types, which every target has and whose arithmetic needs no intrinsics. Intrinsics are
// used where the compiler's generic code is slow.
#pragma once

#include <stdint.h>
#include <string.h>

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../math/lanes.h"

namespace normnorm {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

typedef float VFloat __attribute__((vector_size(kVectorBytes)));
typedef double VDouble __attribute__((vector_size(kVectorBytes)));
typedef int32_t VInt32 __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VUInt32 __attribute__((vector_size(kVectorBytes)));
typedef int64_t VInt64 __attribute__((vector_size(kVectorBytes)));
typedef uint64_t VUInt64 __attribute__((vector_size(kVectorBytes)));

template <class V>
constexpr int kLanes = int(sizeof(V) / sizeof(ScalarOf<V>));

template <>
struct Lanes<VFloat> : FloatLanes<VFloat, VInt32, VUInt32> {
  static NN_HD VFloat to_real(VInt32 i) { return __builtin_convertvector(i, VFloat); }
#if defined(__AVX512F__)
  static NN_HD VFloat at_most(VFloat a, VFloat top) { return _mm512_min_ps(top, a); }
  static NN_HD VFloat at_least(VFloat a, VFloat bottom) { return _mm512_max_ps(bottom, a); }
  static NN_HD VFloat sqrt(VFloat a) { return _mm512_sqrt_ps(a); }
  static NN_HD SplitExponent split_exponent(VFloat a) {
    const VFloat k = _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT);
    return {a - k, _mm512_scalef_ps(_mm512_set1_ps(1.0f), k)};
  }
  static constexpr int kTableBits = 4;
  static NN_HD VFloat lookup(const float (&table)[16], VUInt32 index) {
    return _mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
  }
#elif defined(__AVX2__)
  static NN_HD VFloat at_most(VFloat a, VFloat top) { return _mm256_min_ps(top, a); }
  static NN_HD VFloat at_least(VFloat a, VFloat bottom) { return _mm256_max_ps(bottom, a); }
  static NN_HD VFloat sqrt(VFloat a) { return _mm256_sqrt_ps(a); }
  static constexpr int kTableBits = 3;
  static NN_HD VFloat lookup(const float (&table)[8], VUInt32 index) {
    return _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
  }
#else
#if defined(__x86_64__)
  static NN_HD VFloat at_most(VFloat a, VFloat top) { return _mm_min_ps(top, a); }
  static NN_HD VFloat at_least(VFloat a, VFloat bottom) { return _mm_max_ps(bottom, a); }
  static NN_HD VFloat sqrt(VFloat a) { return _mm_sqrt_ps(a); }
#else
  static NN_HD VFloat sqrt(VFloat a) {
    for (int i = 0; i < kLanes<VFloat>; ++i) a[i] = ::sqrtf(a[i]);
    return a;
  }
#endif
  static constexpr int kTableBits = 4;
  static NN_HD VFloat lookup(const float (&table)[16], VUInt32 index) {
    VFloat v;
    for (int i = 0; i < kLanes<VFloat>; ++i) v[i] = table[index[i] % 16u];
    return v;
  }
#endif
};

template <>
struct Lanes<VDouble> {
  using Scalar = double;
  using Int = VInt64;
  using UInt = VUInt64;
  static NN_HD VDouble at_most(VDouble a, VDouble top) { return top < a ? top : a; }
  static NN_HD VDouble log1p(VDouble a) {
    for (int i = 0; i < kLanes<VDouble>; ++i) a[i] = ::log1p(a[i]);
    return a;
  }
  static NN_HD VDouble exp(VDouble a) {
    for (int i = 0; i < kLanes<VDouble>; ++i) a[i] = ::exp(a[i]);
    return a;
  }
  static NN_HD VDouble expm1(VDouble a) {
    for (int i = 0; i < kLanes<VDouble>; ++i) a[i] = ::expm1(a[i]);
    return a;
  }
  static NN_HD VDouble erf(VDouble a) {
    for (int i = 0; i < kLanes<VDouble>; ++i) a[i] = ::erf(a[i]);
    return a;
  }
};

// The vector type of scalar S.
template <class S>
struct VectorFor;
template <>
struct VectorFor<float> {
  using type = VFloat;
};
template <>
struct VectorFor<double> {
  using type = VDouble;
};
template <class S>
using VectorOf = typename VectorFor<S>::type;

template <class V>
NN_HD V load_dense(const ScalarOf<V>* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V>
NN_HD void store_dense(ScalarOf<V>* p, V v) {
  memcpy(p, &v, sizeof(V));
}

template <class V>
NN_HD void add_dense(ScalarOf<V>* p, V v) {
  store_dense<V>(p, load_dense<V>(p) + v);
}

// A mask of the first `count` lanes.
template <class V>
NN_HD typename Lanes<V>::Int first_lanes(int count) {
  typename Lanes<V>::Int lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  return lane < count;
}

// The first `count` lanes alone are read or written; a read makes the others 0.
template <class V>
NN_HD V load_some(const ScalarOf<V>* p, int count) {
#if defined(__AVX512F__)
  if constexpr (HasFloatLanes<V>::value) return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1u), p);
#elif defined(__AVX2__)
  if constexpr (HasFloatLanes<V>::value) return _mm256_maskload_ps(p, (__m256i)first_lanes<V>(count));
#endif
  ScalarOf<V> lanes[kLanes<V>] = {};
  for (int i = 0; i < count; ++i) lanes[i] = p[i];
  return load_dense<V>(lanes);
}
template <class V>
NN_HD void store_some(ScalarOf<V>* p, V v, int count) {
#if defined(__AVX512F__)
  if constexpr (HasFloatLanes<V>::value) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1u), v);
#elif defined(__AVX2__)
  if constexpr (HasFloatLanes<V>::value) return _mm256_maskstore_ps(p, (__m256i)first_lanes<V>(count), v);
#endif
  ScalarOf<V> lanes[kLanes<V>];
  store_dense<V>(lanes, v);
  for (int i = 0; i < count; ++i) p[i] = lanes[i];
}

// A whole vector, or its first `lanes` elements where kPartial.
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

template <class V>
NN_HD double sum_lanes(V v) {
  double sum = 0;
  for (int i = 0; i < kLanes<V>; ++i) sum += double(v[i]);
  return sum;
}

#if defined(__AVX512F__)
// A tree of four levels, which takes a tenth of the time of a loop over lanes.
template <>
NN_HD double sum_lanes<VFloat>(VFloat v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
#endif

// body(partial, offset, steps, lanes) over `size` contiguous elements: whole vectors, then the rest.
template <class V, class F>
NN_HD void for_vectors(int64_t size, F body) {
  const int64_t whole = size / kLanes<V>;
  if (whole) body(std::false_type(), int64_t(0), whole, kLanes<V>);
  const int rest = int(size % kLanes<V>);
  if (rest) body(std::true_type(), whole * kLanes<V>, int64_t(1), rest);
}

}  // namespace
}  // namespace normnorm
