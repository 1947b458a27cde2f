// log1p and powers for lane types.
//
// float lanes use short minimax polynomials (errors below) and tables that a vector register holds; double lanes call
// the C library. None has a branch.
#pragma once

#include "lanes.h"

namespace normnorm {
namespace {

// For entry i of 2^kBits: a float near 1/(1 + i 2^-kBits), chosen so that minus its logarithm, the entry of kLog, is
// nearly a float too; and p(f) in log(1+f) = f + f^2 p(f) for |f| <= 2^-(kBits+1).
template <int kBits>
struct LogTable;

template <>
struct LogTable<4> {
  static constexpr float kInverse[16] = {1.0f, 0.941317141f, 0.888807893f, 0.842035592f,
                                         0.800120592f, 0.761999667f, 0.727389693f, 0.695685983f,
                                         0.666792929f, 0.639888167f, 0.615399599f, 0.592769265f,
                                         0.571472168f, 0.55175221f, 0.5332219f, 0.516261339f};
  static constexpr float kLog[16] = {0.0f, 0.0604751706f, 0.11787416f, 0.171932995f,
                                     0.222992823f, 0.271809161f, 0.318292916f, 0.362856895f,
                                     0.405275732f, 0.446461856f, 0.485483468f, 0.522950053f,
                                     0.559539497f, 0.594656229f, 0.628817618f, 0.66114217f};
  // relative error of the logarithm 3.4e-8
  template <class V>
  static NN_HD V tail(V f) {
    const V p = f * -2.501751819e-01f + 3.334971836e-01f;
    return p * f - 4.999999730e-01f;
  }
};

template <>
struct LogTable<3> {
  static constexpr float kInverse[8] = {1.0f, 0.888807893f, 0.800120592f, 0.727389693f,
                                        0.666792929f, 0.615399599f, 0.571472168f, 0.5332219f};
  static constexpr float kLog[8] = {0.0f, 0.11787416f, 0.222992823f, 0.318292916f,
                                    0.405275732f, 0.485483468f, 0.559539497f, 0.628817618f};
  // relative error of the logarithm 1.0e-8
  template <class V>
  static NN_HD V tail(V f) {
    V p = f * 2.008027666e-01f - 2.508243436e-01f;
    p = p * f + 3.333323168e-01f;
    return p * f - 4.999991887e-01f;
  }
};

// log(1+t) for t >= 0; float lanes up to 2^125. With k and the entry i nearest to 1+t = 2^k (1 + i 2^-kBits) it is
// k log 2 + kLog[i] + log(1+f), where f is computed from t itself: for small t, k = i = 0 and f = t exactly.
template <class V>
NN_HD V log1p_nonneg(V t) {
  if constexpr (HasFloatLanes<V>::value) {
    using UInt = typename Lanes<V>::UInt;
    using Int = typename Lanes<V>::Int;
    using Table = LogTable<Lanes<V>::kTableBits>;
    constexpr int shift = 23 - Lanes<V>::kTableBits;
    // minus the bits of 1, plus half an entry
    const UInt bits = bit_cast<UInt>(V(t + 1.0f)) - (0x3f800000u - (1u << (shift - 1)));
    const UInt index = bits >> shift, k_bits = bits & 0xff800000u;
    const V scale = bit_cast<V>(UInt(bit_cast<UInt>(Lanes<V>::lookup(Table::kInverse, index)) - k_bits));
    const V f = t * scale + (scale - 1.0f);
    const V k = Lanes<V>::to_real(bit_cast<Int>(k_bits));  // times 2^23
    return (f * f * Table::tail(f) + f) + (k * 8.26295829e-08f + Lanes<V>::lookup(Table::kLog, index));
  } else {
    return Lanes<V>::log1p(t);
  }
}

// B^a and B^a - 1, where the base B is 2 for float lanes and e for double lanes, which call the C library; a <= 127 in
// float lanes. The second is accurate relative to itself around 0, so that (P-1)/eta is accurate for small eta without
// a branch.
template <class V>
struct PowerPair {
  V power, minus_one;
};

// The exponent to base B of e.
template <class V>
constexpr ScalarOf<V> kPowerUnit = HasFloatLanes<V>::value ? ScalarOf<V>(1.4426950408889634) : ScalarOf<V>(1);

template <class V>
NN_HD PowerPair<V> power_pair(V a) {
  if constexpr (HasFloatLanes<V>::value) {
    const auto split = Lanes<V>::split_exponent(a);
    const V r = split.rest;
    V p = r * 1.540351264e-04f + 1.339073548e-03f;
    p = p * r + 9.618237494e-03f;
    p = p * r + 5.550357434e-02f;
    p = p * r + 2.402264979e-01f;
    p = p * r + 6.931471879e-01f;
    const V small = p * r;  // 2^rest - 1, relative error 1.1e-8
    return {small * split.power + split.power, small * split.power + (split.power - 1.0f)};
  } else {
    return {Lanes<V>::exp(a), Lanes<V>::expm1(a)};
  }
}

}  // namespace
}  // namespace normnorm
