// log1p, exp, expm1, sine and cosine for lane types.
//
// float lanes use short minimax polynomials (errors below), which vectorise on every instruction set; float64 lanes
// call the C library. None has a branch.
#pragma once

#include "lanes.h"

namespace normnorm {
namespace {

// p(f) in log(1+f) = f - f^2/2 + f^3 p(f) for f in [sqrt(1/2)-1, sqrt(2)-1]; relative error of the logarithm 6e-9.
template <class V>
NN_HD V log_tail(V f) {
  const V f2 = f * f;
  V even = f2 * 1.276154965e-01f + 1.420176178e-01f;
  V odd = f2 * -7.634429634e-02f - 1.316019446e-01f;
  even = even * f2 + 2.000122666e-01f;
  odd = odd * f2 - 1.662335694e-01f;
  even = even * f2 + 3.333333135e-01f;
  odd = odd * f2 - 2.500082254e-01f;
  return odd * f + even;
}

// log(1+f) + k log 2 for f in the same interval.
template <class V>
NN_HD V log_from_parts(V f, V k) {
  const V f2 = f * f;
  const V tail = f2 * (f * log_tail(f) - 0.5f) + k * -2.12194440e-4f;
  return k * 0.693359375f + (tail + f);
}

// k << 23 for the k with sqrt(1/2) <= x / 2^k < sqrt(2), from the bits of x > 0.
template <class UInt>
NN_HD UInt nearest_power_bits(UInt bits) {
  return (bits - 0x3f3504f3u) & 0xff800000u;
}

// log(1+t) for t >= 0. In 1+t = 2^k (1+f), f is computed from t by exact scaling, so nothing cancels for small t.
template <class V>
NN_HD V log1p_nonneg(V t) {
  if constexpr (HasFloatLanes<V>::value) {
    using UInt = typename Lanes<V>::UInt;
    using Int = typename Lanes<V>::Int;
    const UInt k_bits = nearest_power_bits(bit_cast<UInt>(V(t + 1.0f)));
    const V scale = bit_cast<V>(UInt(0x3f800000u - k_bits));  // 2^-k
    const V f = t * scale + (scale - 1.0f);
    return log_from_parts(f, V(Lanes<V>::to_real(Int(bit_cast<Int>(k_bits) >> 23))));
  } else {
    return Lanes<V>::log1p(t);
  }
}

// exp(a) and exp(a)-1 for a <= 88; a is clamped to -87 from below. The second is accurate relative to itself around 0,
// so that (P-1)/eta is accurate for small eta without a branch.
template <class V>
struct ExpPair {
  V exp, expm1;
};

template <class V>
NN_HD ExpPair<V> exp_pair(V a) {
  if constexpr (HasFloatLanes<V>::value) {
    using UInt = typename Lanes<V>::UInt;
    a = Lanes<V>::at_least(a, splat<V>(-87.0f));
    const V biased = a * 1.44269504f + 12582912.0f;  // + 1.5 * 2^23: k is in the low mantissa bits
    const V k = biased - 12582912.0f;
    V f = a - k * 0.693359375f;
    f = f + k * 2.12194440e-4f;
    const V f2 = f * f;
    V tail = f * 8.366581053e-03f + 4.166720062e-02f;
    tail = (f2 * 1.388250384e-03f + tail) * f2 + (f * 1.666654348e-01f + 4.999999702e-01f);
    const V small = f2 * tail + f;  // exp(f) - 1, |f| <= log(2)/2, relative error 1.4e-8
    const V scale = bit_cast<V>(UInt((bit_cast<UInt>(biased) << 23) + 0x3f800000u));
    return {small * scale + scale, small * scale + (scale - 1.0f)};
  } else {
    return {Lanes<V>::exp(a), Lanes<V>::expm1(a)};
  }
}

// sin and cos of 2 pi (w + 1/2) / 2^32 for 32-bit words w. The reduction to an octant is exact, in integers.
template <class V>
struct SinCos {
  V sin, cos;
};

template <class V>
NN_HD SinCos<V> sincos_turn(typename Lanes<V>::UInt w) {
  using UInt = typename Lanes<V>::UInt;
  using Int = typename Lanes<V>::Int;
  const UInt quadrant = w + 0x20000000u;  // its bits 31 and 30: the nearest multiple of a quarter turn
  const Int rest = bit_cast<Int>(UInt(w - (quadrant & 0xc0000000u)));
  const V x = (V(Lanes<V>::to_real(rest)) + 0.5f) * 1.46291807926715968e-09f;
  const V x2 = x * x;
  const V s = ((x2 * -1.951729791e-04f + 8.332177997e-03f) * x2 - 1.666665524e-01f) * (x2 * x) + x;
  const V c =
      ((x2 * 2.443845005e-05f - 1.388736768e-03f) * x2 + 4.166664556e-02f) * (x2 * x2) + (1.0f - x2 * 0.5f);
  const auto odd = (quadrant & 0x40000000u) != 0u;
  const V sin_part = odd ? c : s;
  const V cos_part = odd ? s : c;
  // the sine is negative in quadrants 2 and 3, the cosine in 1 and 2
  const UInt sin_sign = quadrant & 0x80000000u;
  const UInt cos_sign = (quadrant + 0x40000000u) & 0x80000000u;
  return {bit_cast<V>(UInt(bit_cast<UInt>(sin_part) ^ sin_sign)),
          bit_cast<V>(UInt(bit_cast<UInt>(cos_part) ^ cos_sign))};
}

}  // namespace
}  // namespace normnorm
