// The Yeo-Johnson transform psi(h; lmbda), its slope in h and its derivative in lmbda.
//
// With t = |h|, l = log(1+t), eta = 1 + sign(h)(lmbda - 1) and P = (1+t)^eta:
//   |psi| = (P-1)/eta      dpsi/dh = P/(1+t)      dpsi/dlmbda = (P l - |psi|)/eta  (for either sign of h)
// eta depends on the sign of h: a group has two exponents, whose constants are computed once.
#pragma once

#include "elementary.h"
#include "settings.h"

namespace normnorm {
namespace {

// The constants of one group, _pos for h >= 0 and _neg for h < 0. V is a scalar, or a vector with a group in each lane.
template <class V>
struct Exponents {
  V eta_pos, eta_neg;
  V inverse_pos, inverse_neg;  // 1/eta
  V active_pos, active_neg;    // 0 where transform_eps makes psi log(1+t) and its derivative in lmbda 0
};

// The constants for the sign of one element.
template <class V>
struct Side {
  V eta, inverse, active;
};

template <class S>
struct TransformLimits;
template <>
struct TransformLimits<float> {
  static constexpr float kTinyEta = 1e-12f;     // (exp(eta l)-1)/eta equals l to rounding
  static constexpr float kMaxExponent = 80.0f;  // exp of it is finite, with room for a factor
};
template <>
struct TransformLimits<double> {
  static constexpr double kTinyEta = 1e-20;
  static constexpr double kMaxExponent = 700.0;
};

template <class S>
NN_HD Side<S> make_side(S eta, S transform_eps) {
  const bool linear = transform_eps > S(0) && S(::fabs(eta)) <= transform_eps;
  S shifted = linear ? S(0) : eta + (eta < S(0) ? -transform_eps : transform_eps);
  // For eta = 0 the limit is psi = log(1+t), which a tiny exponent gives to rounding, without a branch per element.
  shifted = S(::fabs(shifted)) < TransformLimits<S>::kTinyEta ? TransformLimits<S>::kTinyEta : shifted;
  return {shifted, quotient(S(1), shifted), linear ? S(0) : S(1)};
}

template <class S>
NN_HD Exponents<S> make_exponents(S lmbda, Settings<S> s) {
  const Side<S> pos = make_side<S>(lmbda, s.transform_eps);
  const Side<S> neg = make_side<S>(S(2) - lmbda, s.transform_eps);
  return {pos.eta, neg.eta, pos.inverse, neg.inverse, pos.active, neg.active};
}

template <class V>
NN_HD Side<V> side_of(V h, const Exponents<V>& e) {
  const auto negative = h < splat<V>(0);
  return {negative ? e.eta_neg : e.eta_pos, negative ? e.inverse_neg : e.inverse_pos,
          negative ? e.active_neg : e.active_pos};
}

template <class V>
NN_HD V clamp_exponent(V a) {
  return Lanes<V>::at_most(a, splat<V>(TransformLimits<ScalarOf<V>>::kMaxExponent));
}

// The exponents in the form that costs an element the least: eta in units of power_pair(), 1/eta with the sign of h.
template <class V>
NN_HD Exponents<V> power_exponents(Exponents<V> e) {
  e.eta_pos = e.eta_pos * kPowerUnit<V>;
  e.eta_neg = e.eta_neg * kPowerUnit<V>;
  e.inverse_neg = -e.inverse_neg;
  return e;
}

// P and P - 1 from l = log(1+|h|) and a side of power_exponents(), whose inverse times P - 1 is psi.
template <class V>
NN_HD PowerPair<V> transform_power(V l, const Side<V>& side) {
  constexpr ScalarOf<V> top = TransformLimits<ScalarOf<V>>::kMaxExponent * kPowerUnit<V>;
  return power_pair<V>(Lanes<V>::at_most(side.eta * l, splat<V>(top)));
}

// E2(a) = (a e^a - e^a + 1)/a^2 for |a| < 1/2, accurate around 0; dpsi/dlmbda = l^2 E2(eta l).
template <class V>
NN_HD V second_exponential(V a) {
  if constexpr (HasFloatLanes<V>::value) {
    V p = a * 1.731696539e-04f + 1.200088067e-03f;
    p = p * a + 6.944879889e-03f;
    p = p * a + 3.333214298e-02f;
    p = p * a + 1.249999478e-01f;
    p = p * a + 3.333333731e-01f;
    return p * a + 5.000000000e-01f;
  } else {
    // the sum of a^k (k+1)/(k+2)!, exact to rounding with 17 terms
    V sum = splat<V>(0);
    double coefficient = 17.0 / 6402373705728000.0;  // k = 16: 17/18!
    for (int k = 16; k >= 0; --k) {
      sum = sum * a + coefficient;
      coefficient *= k * (k + 2.0) / (k + 1.0);
    }
    return sum;
  }
}

// dpsi/dh and dpsi/dlmbda.
template <class V>
struct PsiSlopes {
  V psi_h;
  V psi_lambda;
};

// kSeries: an |eta| of the group is small, so that P l - |psi| would cancel and a series replaces it; lambda is frozen, so
// that the exponent may have been clamped, in which case both slopes are 0; or transform_eps > 0 may make psi a logarithm.
template <bool kSeries, class V>
NN_HD PsiSlopes<V> psi_slopes(V l, V reciprocal /* 1/(1+t) */, V power, V psi, const Side<V>& side) {
  V psi_h = power * reciprocal;
  V psi_lambda = (power * l - psi) * side.inverse;
  if constexpr (kSeries) {
    const V a = side.eta * l, zero = splat<V>(0);
    const auto near_zero = magnitude(a) < splat<V>(ScalarOf<V>(0.5));
    const auto saturated = a > splat<V>(TransformLimits<ScalarOf<V>>::kMaxExponent);
    psi_lambda = near_zero ? V(l * l * second_exponential<V>(a)) : psi_lambda;
    psi_lambda = saturated ? zero : psi_lambda;
    psi_h = saturated ? zero : psi_h;
    psi_lambda = psi_lambda * side.active;
  }
  return {psi_h, psi_lambda};
}

// Whether an exponent of the group is small: with both at least `bound` the direct form loses less than 1 / bound ulp of l.
template <class S>
NN_HD bool has_small_exponent(const Exponents<S>& e, S bound) {
  return !((S(::fabs(e.eta_pos)) >= bound) & (S(::fabs(e.eta_neg)) >= bound));
}

}  // namespace
}  // namespace normnorm
