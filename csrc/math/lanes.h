// Operations on a lane type V, which is a scalar (host, device, tests) or a SIMD vector, so that one formula serves
// both.
//
// Arithmetic, comparisons and `mask ? a : b` have the same syntax for float and for a vector of floats; Lanes<V> has
// the rest. Its specialisations for vectors are in cpu/simd.h.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "macros.h"

namespace normnorm {
namespace {

template <class V>
struct Lanes;

template <>
struct Lanes<float> {
  using Scalar = float;
  using Int = int32_t;
  using UInt = uint32_t;
  static NN_HD float to_real(int32_t i) { return static_cast<float>(i); }
  static NN_HD float sqrt(float a) { return ::sqrtf(a); }
  // A NaN in `a` is kept. With the comparison in this order x86 needs one instruction.
  static NN_HD float at_most(float a, float top) { return top < a ? top : a; }
  static NN_HD float at_least(float a, float bottom) { return bottom > a ? bottom : a; }
};

template <>
struct Lanes<double> {
  using Scalar = double;
  using Int = int64_t;
  using UInt = uint64_t;
  static NN_HD double sqrt(double a) { return ::sqrt(a); }
  static NN_HD double at_most(double a, double top) { return top < a ? top : a; }
  static NN_HD double log1p(double a) { return ::log1p(a); }
  static NN_HD double exp(double a) { return ::exp(a); }
  static NN_HD double expm1(double a) { return ::expm1(a); }
  static NN_HD double erf(double a) { return ::erf(a); }
};

template <class V>
using ScalarOf = typename Lanes<V>::Scalar;

// float lanes use the polynomials of elementary.h, double lanes the C library.
template <class V>
struct HasFloatLanes {
  static constexpr bool value = sizeof(ScalarOf<V>) == 4;
};

// s in every lane. The compiler removes `s - 0` but not `0 + s`, which changes -0.
template <class V>
NN_HD V splat(ScalarOf<V> s) {
  return s - V{};
}

template <class To, class From>
NN_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class V>
NN_HD V magnitude(V a) {
  using UInt = typename Lanes<V>::UInt;
  const UInt sign = bit_cast<UInt>(splat<V>(ScalarOf<V>(-0.0)));
  return bit_cast<V>(UInt(bit_cast<UInt>(a) & ~sign));
}

// |a| with the sign of b; `a` must not be negative.
template <class V>
NN_HD V with_sign_of(V a, V b) {
  using UInt = typename Lanes<V>::UInt;
  const UInt sign = bit_cast<UInt>(splat<V>(ScalarOf<V>(-0.0)));
  return bit_cast<V>(UInt(bit_cast<UInt>(a) | (bit_cast<UInt>(b) & sign)));
}

}  // namespace
}  // namespace normnorm
