// Two standard normals by Box-Muller from a 32-bit word w of a counter and the next word (after the last, the first):
// the radius from U = (w + 1/2) 2^-32, the angle from both words.
//
// The angle in turns is (c w + next) 2^-32 modulo 1 with c = 2^32 divided by the golden ratio. It is independent of U,
// since `next` is independent of w; c separates the angles of close w whose next words are close too.
#pragma once

#include "lanes.h"

namespace normnorm {
namespace {

template <class UInt>
NN_HD UInt turn_word(UInt word, UInt next) {
  return word * 0x9e3779b9u + next;
}

// -2 log U of float lanes, relative error 3e-7 near 0 and near 1: above 1/2, U = 1 - smaller, and `smaller` comes from
// the word's complement. p(f) f = -2 log(1+f) for f in [sqrt(1/2)-1, sqrt(2)-1], relative error 1.7e-7.
template <class V>
NN_HD V minus_two_log_uniform(typename Lanes<V>::UInt w) {
  using UInt = typename Lanes<V>::UInt;
  using Int = typename Lanes<V>::Int;
  const Int sign = bit_cast<Int>(w) >> 31;  // all bits where U > 1/2
  const V smaller = V(Lanes<V>::to_real(bit_cast<Int>(w) ^ sign)) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const V u = sign != 0 ? V(1.0f - smaller) : smaller;
  const UInt k_bits = UInt(bit_cast<UInt>(u) - 0x3f3504f3u) & 0xff800000u;  // k << 23 for u in 2^k [sqrt(1/2), sqrt(2))
  const V f = k_bits == 0u ? V(0.0f - smaller) : V(bit_cast<V>(UInt(bit_cast<UInt>(u) - k_bits)) - 1.0f);
  const V k = Lanes<V>::to_real(Int(bit_cast<Int>(k_bits) >> 23));
  V p = f * 2.021379344e-01f - 3.244517074e-01f;
  p = p * f + 3.450166253e-01f;
  p = p * f - 3.980032998e-01f;
  p = p * f + 4.993981783e-01f;
  p = p * f - 6.667011791e-01f;
  p = p * f + 1.000007303e+00f;
  p = p * f - 1.999999891e+00f;
  return f * p + k * -1.3862943611e+00f;
}

template <class V>
NN_HD V normal_radius(typename Lanes<V>::UInt word) {
  return Lanes<V>::sqrt(minus_two_log_uniform<V>(word));
}

template <class V>
struct NormalPair {
  V first, second;
};

// radius cos and radius sin of an angle of 2^-32 t turns. Integer arithmetic subtracts the nearest half turn; sine and
// cosine of the rest, within a quarter turn of 0, have errors of 6e-8.
template <class V>
NN_HD NormalPair<V> on_circle(V radius, typename Lanes<V>::UInt t) {
  using UInt = typename Lanes<V>::UInt;
  using Int = typename Lanes<V>::Int;
  const UInt half_turn = (t + 0x40000000u) & 0x80000000u;
  const V x = V(Lanes<V>::to_real(bit_cast<Int>(UInt(t - half_turn)))) * 4.6566128730773926e-10f;  // in half turns
  const V y = x * x;
  const V sin = ((((y * 7.722012784e-02f - 5.980451738e-01f) * y + 2.550031377e+00f) * y - 5.167706879e+00f) * y +
                 3.141592580e+00f) * x;
  const V cos = (((y * 2.200806433e-01f - 1.332093861e+00f) * y + 4.058451341e+00f) * y - 4.934795518e+00f) * y + 1.0f;
  const V signed_radius = bit_cast<V>(UInt(bit_cast<UInt>(radius) ^ half_turn));
  return {signed_radius * cos, signed_radius * sin};
}

// float64: the same words, with the C library's functions.
NN_HD NormalPair<double> normal_pair_double(uint32_t word, uint32_t next) {
  const double unit = 2.3283064365386962890625e-10;  // 2^-32
  const double radius = ::sqrt(-2.0 * ::log((word + 0.5) * unit));
  const double angle = 6.283185307179586476925 * (turn_word(word, next) * unit);
  return {radius * ::cos(angle), radius * ::sin(angle)};
}

}  // namespace
}  // namespace normnorm
