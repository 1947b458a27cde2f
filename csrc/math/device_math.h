// Logarithm, power and Box-Muller in the GPU's special-function instructions.
//
// transform.h and normals.h have the same formulae in portable polynomials. These take a third of the instructions and
// have an absolute error of about 2^-22. Host compilers use the C library instead, so that the kernels can run without
// a GPU. float64 uses the C library everywhere.
#pragma once

#include "lmbda.h"
#include "normals.h"
#include "philox.h"
#include "transform.h"

namespace normnorm {
namespace {

#if defined(__CUDA_ARCH__)
#define NN_MUFU(name, instruction, host)                           \
  NN_HD float name(float x) {                                      \
    float y;                                                       \
    asm(instruction ".approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); \
    return y;                                                      \
  }
#else
#define NN_MUFU(name, instruction, host) \
  NN_HD float name(float x) { return host; }
#endif
NN_MUFU(fast_log2, "lg2", ::log2f(x))
NN_MUFU(fast_exp2, "ex2", ::exp2f(x))
NN_MUFU(fast_reciprocal, "rcp", 1.0f / x)
NN_MUFU(fast_sqrt, "sqrt", ::sqrtf(x))
NN_MUFU(fast_rsqrt, "rsqrt", 1.0f / ::sqrtf(x))
NN_MUFU(fast_sin, "sin", ::sinf(x))
NN_MUFU(fast_cos, "cos", ::cosf(x))
#undef NN_MUFU

NN_HD double fast_reciprocal(double x) { return 1.0 / x; }
NN_HD double fast_rsqrt(double x) { return 1.0 / ::sqrt(x); }

// Unlike the bit casts of lanes.h, the compiler folds these into the operands of other instructions.
NN_HD float absolute(float x) { return ::fabsf(x); }
NN_HD double absolute(double x) { return ::fabs(x); }
NN_HD float signed_as(float x, float sign) { return ::copysignf(x, sign); }
NN_HD double signed_as(double x, double sign) { return ::copysign(x, sign); }

// a b + c with one rounding, also on hosts. Explicit where an element is computed by two pieces of code that must give
// the same bits.
NN_HD float fused(float a, float b, float c) { return ::fmaf(a, b, c); }
NN_HD double fused(double a, double b, double c) { return ::fma(a, b, c); }

// a b, which the compiler must not contract into a fused multiply-add.
NN_HD float rounded_product(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}
NN_HD double rounded_product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

// (e^a - 1)/a for |a| < 1/2, accurate around 0.
NN_HD float first_exponential(float a) {
  float p = a * 1.9841270e-04f + 1.3888889e-03f;
  p = p * a + 8.3333333e-03f;
  p = p * a + 4.1666667e-02f;
  p = p * a + 1.6666667e-01f;
  p = p * a + 0.5f;
  return p * a + 1.0f;
}

// The power P of one element and psi = inverse (P - 1), `inverse` being 1/eta with the sign of h.
template <class V>
struct PowerPsi {
  V power, psi;
};

// Logarithms and powers in the base of the instructions: 2 for float, e for double. kUnit is the base's natural
// logarithm.
template <class V>
struct DeviceLog;

template <>
struct DeviceLog<float> {
  static constexpr float kUnit = 0.6931471805599453f;
  static NN_HD float of(float t) { return fast_log2(1.0f + t); }
  static NN_HD float bounded(float a) {  // keeps a NaN
#if defined(__CUDA_ARCH__)
    float b;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(b) : "f"(a), "f"(TransformLimits<float>::kMaxExponent / kUnit));
    return b;
#else
    return clamp_exponent<float>(a * kUnit) / kUnit;
#endif
  }
  static NN_HD PowerPsi<float> power_psi(float a, float inverse) {
    const float power = fast_exp2(a);
    return {power, fused(power, inverse, -inverse)};  // one rounding
  }
  // Both functions of a natural exponent, the second accurate around 0.
  static NN_HD PowerPair<float> exact_power(float a) {
    const float power = fast_exp2(a * 1.4426950408889634f);
    const float series = a * first_exponential(a);
    return {power, absolute(a) < 0.5f ? series : power - 1.0f};
  }
};

template <>
struct DeviceLog<double> {
  static constexpr double kUnit = 1.0;
  static NN_HD double of(double t) { return ::log1p(t); }
  static NN_HD double bounded(double a) { return clamp_exponent<double>(a); }
  static NN_HD PowerPsi<double> power_psi(double a, double inverse) { return {::exp(a), ::expm1(a) * inverse}; }
  static NN_HD PowerPair<double> exact_power(double a) { return power_pair<double>(a); }
};

// How a group's powers are computed.
enum class PrecisionPath {
  kPlain,    // no exponent is small or large, and h is standardized: no power overflows
  kBounded,  // the same with frozen statistics: h is unbounded, so exponents are clamped
  kSeries,   // an exponent is small, so that P - 1 would cancel, or large; or transform_eps > 0
};

// Whether eta log(1 + |h|) can exceed kMaxExponent for a standardized h, which in a group of 2^31 is below 46341:
// 80 / 7 is the logarithm of 92000.
template <class S>
NN_HD bool has_large_exponent(const Exponents<S>& e) {
  return !((e.eta_pos <= S(7)) & (e.eta_neg <= S(7)));
}

template <class S>
NN_HD PrecisionPath precision_path(const Exponents<S>& e, Settings<S> s, bool frozen) {
  if ((s.transform_eps > S(0)) | has_small_exponent(e, s.small_exponent)) return PrecisionPath::kSeries;
  if (frozen) return PrecisionPath::kBounded;
  return has_large_exponent(e) ? PrecisionPath::kSeries : PrecisionPath::kPlain;
}

// A group's exponents for kPlain. With eta = 1 + sign(h) tilt, eta |log| = |log| + tilt log for the signed logarithm:
// one instruction, where selecting an exponent and multiplying by it take three. The inverses have the sign of h.
template <class V>
struct SignedExponent {
  V tilt, inverse_pos, inverse_neg;
  NN_HD V inverse(V h) const { return h < V(0) ? inverse_neg : inverse_pos; }
};

// psi is multiplied by `scale`.
template <class S>
NN_HD SignedExponent<S> signed_exponent(const Exponents<S>& e, S scale) {
  return {e.eta_pos - S(1), e.inverse_pos * scale, -e.inverse_neg * scale};
}

template <bool kBounded, class V>
NN_HD PowerPsi<V> plain_power_psi(V signed_log, V inverse, V tilt) {
  const V a = fused(tilt, signed_log, absolute(signed_log));
  return DeviceLog<V>::power_psi(kBounded ? DeviceLog<V>::bounded(a) : a, inverse);
}

// Adds the terms of h to the sums; returns sign(h) log(1+|h|) in the device's base.
template <class V>
NN_HD V add_lambda_terms(LambdaSums<V>& sums, V h) {
  const V t = absolute(h), log = DeviceLog<V>::of(t), signed_log = signed_as(log, h);
  sums.add(h, t, log, signed_log, DeviceLog<V>::kUnit);
  return signed_log;
}
template <class V>
NN_HD void lambda_totals(const LambdaSums<V>& sums, V (&out)[4]) {
  const LambdaTerms<V> total = sums.totals(DeviceLog<V>::kUnit);
  out[0] = total.hd, out[1] = total.log, out[2] = total.d, out[3] = total.e;
}

// lambda_weight() of lmbda.h by Horner's rule in t; `log` is in the device's base.
template <class V>
NN_HD V device_lambda_weight(V h, V t, V log, V reciprocal, const LambdaGradient<V>& c) {
  constexpr V unit = DeviceLog<V>::kUnit;
  const V odd = h < V(0) ? -c.c_o : c.c_o;
  const V y = fused(log, V(2) * unit, V(-1));
  const V of_t = fused(y, fused(odd, y, c.c_e), odd);
  const V of_log = fused(odd, fused(log, V(3) * unit * unit, -c.two_d * unit), c.c_e * unit);
  return fused(t, of_t, fused(log, of_log, c.c_r * reciprocal));
}

// The normals radius cos and radius sin. A float radius lacks the factor kNormalUnit, which the noise's scale includes.
template <class V>
struct PolarPair {
  V radius, cos, sin;
};
template <class V>
constexpr V kNormalUnit = V(1);
template <>
inline constexpr float kNormalUnit<float> = 1.1774100225154747f;  // sqrt(2 log 2)

// The turns are converted as a signed number, so that the angle is within half a turn of zero, where the special-function
// sine is most accurate. The logarithm's absolute value is taken because the uniform number may round to 1.
NN_HD PolarPair<float> polar_pair(uint32_t word, uint32_t next, float) {
  const float uniform = static_cast<float>(word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const float angle = static_cast<float>(static_cast<int32_t>(turn_word(word, next))) * 1.4629180792671596e-09f;
  return {fast_sqrt(absolute(fast_log2(uniform))), fast_cos(angle), fast_sin(angle)};
}
NN_HD PolarPair<double> polar_pair(uint32_t word, uint32_t next, double) {
  const NormalPair<double> both = normal_pair_double(word, next);
  return {1.0, both.first, both.second};
}

// The keys of all rounds, computed once per kernel or group; per counter they would add half of the generator's cost. On
// a GPU all threads of a warp that have not exited must construct it together: the reduction over the warp tells the
// compiler that the keys are uniform, so that they take uniform registers instead of fourteen registers of each thread.
struct PhiloxSchedule {
  uint32_t key[2 * kPhiloxRounds];

  NN_HD PhiloxSchedule() : key{} {}  // where no noise is drawn
  NN_HD explicit PhiloxSchedule(uint64_t seed) {
    PhiloxKeys keys{uint32_t(seed), uint32_t(seed >> 32)};
#if defined(__CUDA_ARCH__)
    keys.first = __reduce_or_sync(0xffffffffu, keys.first);
    keys.second = __reduce_or_sync(0xffffffffu, keys.second);
#endif
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key[2 * round] = keys.first, key[2 * round + 1] = keys.second;
#if defined(__CUDA_ARCH__)
      // keeps the compiler from recomputing them
      asm volatile("" : "+r"(key[2 * round]), "+r"(key[2 * round + 1]));
#endif
      keys.next(round);
    }
  }
};

struct ScheduledKeys {
  const PhiloxSchedule& schedule;
  uint32_t first, second;
  NN_HD explicit ScheduledKeys(const PhiloxSchedule& s) : schedule(s), first(s.key[0]), second(s.key[1]) {}
  NN_HD void next(int round) {
    if (round + 1 == kPhiloxRounds) return;
    first = schedule.key[2 * round + 2], second = schedule.key[2 * round + 3];
  }
};

NN_HD PhiloxWords noise_words(const PhiloxSchedule& schedule, uint32_t stream, uint64_t counter) {
  return philox_rounds(noise_counter(counter, stream), ScheduledKeys(schedule));
}

}  // namespace
}  // namespace normnorm
