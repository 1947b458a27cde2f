// Two standard normals from two 32-bit words (Box-Muller): radius from the first word, angle from the second.
#pragma once

#include "elementary.h"

namespace normnorm {
namespace {

template <class V>
struct NormalPair {
  V first, second;
};

// -2 log((w + 1/2) 2^-32) for float lanes, accurate at both ends: near 1 it is log1p of minus the complement. Words are
// converted in 16-bit halves, which is exact and the same on every instruction set.
template <class V>
NN_HD V minus_two_log_uniform(typename Lanes<V>::UInt w) {
  using UInt = typename Lanes<V>::UInt;
  using Int = typename Lanes<V>::Int;
  const V high = Lanes<V>::to_real(bit_cast<Int>(UInt(w >> 16)));
  const V low = V(Lanes<V>::to_real(bit_cast<Int>(UInt(w & 0xffffu)))) + 0.5f;
  const V value = high * 65536.0f + low;                                 // w + 1/2
  const V complement = (65535.0f - high) * 65536.0f + (65536.0f - low);  // 2^32 - (w + 1/2)
  const UInt k_bits = nearest_power_bits(bit_cast<UInt>(value));
  const V scale = bit_cast<V>(UInt(0x3f800000u - k_bits));
  const auto top = k_bits == (32u << 23);
  const V f = top ? V(complement * -2.3283064365386963e-10f) : V(value * scale - 1.0f);
  const V k = V(Lanes<V>::to_real(Int(bit_cast<Int>(k_bits) >> 23))) - 32.0f;
  return log_from_parts(f, k) * -2.0f;
}

template <class V>
NN_HD V box_muller_radius(typename Lanes<V>::UInt word) {
  return Lanes<V>::sqrt(minus_two_log_uniform<V>(word));
}

template <class V>
NN_HD NormalPair<V> box_muller(typename Lanes<V>::UInt radius_word, typename Lanes<V>::UInt angle_word) {
  const V radius = box_muller_radius<V>(radius_word);
  const SinCos<V> angle = sincos_turn<V>(angle_word);
  return {radius * angle.cos, radius * angle.sin};
}

// float64: the same words, with the C library's functions.
NN_HD NormalPair<double> box_muller_double(uint32_t radius_word, uint32_t angle_word) {
  const double unit = 2.3283064365386962890625e-10;  // 2^-32
  const double radius = ::sqrt(-2.0 * ::log((radius_word + 0.5) * unit));
  const double angle = 6.283185307179586476925 * ((angle_word + 0.5) * unit);
  return {radius * ::cos(angle), radius * ::sin(angle)};
}

}  // namespace
}  // namespace normnorm
