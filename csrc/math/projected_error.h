// The projected error function of a projection t (Joo, Kang and Kim, ICLR 2020) and its derivative:
//
//   E|t - z| = t erf(t / sqrt 2) + sqrt(2 / pi) exp(-t^2 / 2),  z from N(0, 1);  derivative erf(t / sqrt 2)
#pragma once

#include "elementary.h"

namespace normnorm {
namespace {

template <class V>
struct ProjectedError {
  V value, slope;
};

// erf(a / sqrt 2) / a as a polynomial in y = a^2 on [0, 1.5^2]; relative error 3e-9 before rounding the coefficients.
template <class V>
NN_HD V erf_near(V y) {
  V p = y * 1.113253120e-06f - 1.944097858e-05f;
  p = p * y + 2.339331113e-04f;
  p = p * y - 2.379291225e-03f;
  p = p * y + 1.994997449e-02f;
  p = p * y - 1.329813898e-01f;
  return p * y + 7.978845835e-01f;
}

// exp(a^2 / 2) erfc(a / sqrt 2) on [1.4, 5.8]. The fit's error is weighted by exp(-a^2 / 2), by which the result is
// multiplied: the product is accurate to 1.5e-8.
template <class V>
NN_HD V erfcx_far(V a) {
  V q = a * -3.512598683e-05f + 7.640374532e-04f;
  q = q * a - 7.347453162e-03f;
  q = q * a + 4.143877198e-02f;
  q = q * a - 1.535878287e-01f;
  q = q * a + 3.976506365e-01f;
  q = q * a - 7.422291408e-01f;
  return q * a + 9.864582910e-01f;
}

// Value and slope from one exponential. In float32 the slope is 1 and the value |t| beyond 5.8. NaN gives NaN.
template <class V>
NN_HD ProjectedError<V> projected_error(V t) {
  constexpr ScalarOf<V> kRootTwoOverPi = ScalarOf<V>(0.79788456080286535588);
  if constexpr (HasFloatLanes<V>::value) {
    const V a = Lanes<V>::at_most(magnitude(t), splat<V>(5.8f));
    const V y = a * a;
    const V bell = power_pair<V>(y * (-0.5f * kPowerUnit<V>)).power;
    const V near = a * erf_near(y);
    const V far = 1.0f - bell * erfcx_far(a);
    const V slope = with_sign_of(V(a < 1.4f ? near : far), t);
    return {t * slope + bell * kRootTwoOverPi, slope};
  } else {
    const V slope = Lanes<V>::erf(t * ScalarOf<V>(0.70710678118654752440));
    return {t * slope + Lanes<V>::exp(t * t * ScalarOf<V>(-0.5)) * kRootTwoOverPi, slope};
  }
}

}  // namespace
}  // namespace normnorm
