// SIMD lanes: vectors of float or double as wide as the instruction set this file is compiled for.
//
// They are the compiler's own vector types, so arithmetic needs no intrinsics and every target has them;
// intrinsics appear only where the compiler's generic form is poor (square root, half-precision conversion,
// masked loads).
#pragma once

#include <stdint.h>
#include <string.h>

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
struct Lanes<VFloat> {
  using Scalar = float;
  using Int = VInt32;
  using UInt = VUInt32;
  static NN_HD VFloat to_real(VInt32 i) { return __builtin_convertvector(i, VFloat); }
  static NN_HD VFloat at_most(VFloat a, VFloat top) {
#if defined(__AVX512F__)
    return _mm512_min_ps(top, a);
#elif defined(__AVX2__)
    return _mm256_min_ps(top, a);
#elif defined(__x86_64__)
    return _mm_min_ps(top, a);
#else
    return top < a ? top : a;
#endif
  }
  static NN_HD VFloat at_least(VFloat a, VFloat bottom) {
#if defined(__AVX512F__)
    return _mm512_max_ps(bottom, a);
#elif defined(__AVX2__)
    return _mm256_max_ps(bottom, a);
#elif defined(__x86_64__)
    return _mm_max_ps(bottom, a);
#else
    return bottom > a ? bottom : a;
#endif
  }
  static NN_HD VFloat sqrt(VFloat a) {
#if defined(__AVX512F__)
    return _mm512_sqrt_ps(a);
#elif defined(__AVX2__)
    return _mm256_sqrt_ps(a);
#elif defined(__x86_64__)
    return _mm_sqrt_ps(a);
#else
    for (int i = 0; i < kLanes<VFloat>; ++i) a[i] = ::sqrtf(a[i]);
    return a;
#endif
  }
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

// The vector that computes in scalar S.
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

// All ones in the first `count` lanes.
template <class V>
NN_HD typename Lanes<V>::Int first_lanes(int count) {
  typename Lanes<V>::Int lane;
  for (int i = 0; i < kLanes<V>; ++i) lane[i] = i;
  return lane < count;
}

template <class V>
NN_HD double sum_lanes(V v) {
  double sum = 0;
  for (int i = 0; i < kLanes<V>; ++i) sum += double(v[i]);
  return sum;
}

#if defined(__AVX512F__)
// Pairwise within the vector: the rounding is that of a four-level tree, and it costs a tenth of a lane loop.
template <>
NN_HD double sum_lanes<VFloat>(VFloat v) {
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(v));
  const __m512d high = _mm512_cvtps_pd(_mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)));
  return _mm512_reduce_add_pd(_mm512_add_pd(low, high));
}
#endif

}  // namespace
}  // namespace normnorm
