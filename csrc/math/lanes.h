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

// What float lanes of any width can do without an instruction of their own. V is float, or a vector of floats.
template <class V, class I, class U>
struct FloatLanes {
  using Scalar = float;
  using Int = I;
  using UInt = U;
  // A NaN in `a` is kept. With the comparison in this order x86 needs one instruction.
  static NN_HD V at_most(V a, V top) { return top < a ? top : a; }
  static NN_HD V at_least(V a, V bottom) { return bottom > a ? bottom : a; }
  // a = k + rest with an integer k and |rest| <= 1/2; power = 2^k. a is clamped to -126 from below.
  struct SplitExponent {
    V rest, power;
  };
  static NN_HD SplitExponent split_exponent(V a) {
    a = Lanes<V>::at_least(a, V{} - 126.0f);
    const V biased = a + 12582912.0f;  // + 1.5 * 2^23: k is in the low mantissa bits
    U bits;
    memcpy(&bits, &biased, sizeof(bits));
    bits = (bits << 23) + 0x3f800000u;
    V power;
    memcpy(&power, &bits, sizeof(power));
    return {a - (biased - 12582912.0f), power};
  }
};

template <>
struct Lanes<float> : FloatLanes<float, int32_t, uint32_t> {
  static NN_HD float to_real(int32_t i) { return static_cast<float>(i); }
  static NN_HD float sqrt(float a) { return ::sqrtf(a); }
  // The elements of a table of 2^kTableBits; the upper bits of an index are ignored.
  static constexpr int kTableBits = 4;
  static NN_HD float lookup(const float (&table)[16], uint32_t index) { return table[index % 16u]; }
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

// a / b of a group's constants. On a device to 2 ulp: rounded correctly it takes four times as many instructions.
NN_HD double quotient(double a, double b) { return a / b; }
NN_HD float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
  return a * inverse;
#else
  return a / b;
#endif
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
