// Logarithm, power, and Box-Muller as a GPU computes them: one special-function instruction each.
//
// transform.h and normals.h hold the same formulae over portable polynomials; these forms cost a third of the
// instructions and err by about 2^-22 absolutely, which is what float32 storage can show. Host compilers take
// the C library instead, so that the kernels can be run and checked without a GPU. float64 is the C library
// everywhere.
#pragma once

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

// In these spellings the compiler folds them into the operands of other instructions; the bit casts of lanes.h, made for
// vectors, it does not.
NN_HD float absolute(float x) { return ::fabsf(x); }
NN_HD double absolute(double x) { return ::fabs(x); }
NN_HD float signed_as(float x, float sign) { return ::copysignf(x, sign); }
NN_HD double signed_as(double x, double sign) { return ::copysign(x, sign); }

// (e^a - 1)/a for |a| < 1/2, the sibling of second_exponential().
NN_HD float first_exponential(float a) {
  float p = a * 1.9841270e-04f + 1.3888889e-03f;
  p = p * a + 8.3333333e-03f;
  p = p * a + 4.1666667e-02f;
  p = p * a + 1.6666667e-01f;
  p = p * a + 0.5f;
  return p * a + 1.0f;
}

template <class V>
struct PowerPsi {
  V power;      // P = (1+t)^eta
  V magnitude;  // |psi|
};

// Logarithms in the base that the power wants: 2 for float, e for double.
template <class V>
struct DeviceLog;

template <>
struct DeviceLog<float> {
  static NN_HD float of(float t) { return fast_log2(1.0f + t); }
  static NN_HD float natural(float log) { return log * 0.6931471805599453f; }

  // kCareful: an exponent of the group is small, so P - 1 would cancel, or h is unbounded (frozen
  // statistics).
  template <bool kCareful>
  static NN_HD PowerPsi<float> psi(float log, const Side<float>& side) {
    if constexpr (!kCareful) {
      const float power = fast_exp2(side.eta * log);
      return {power, (power - 1.0f) * side.inverse};
    } else {
      const float a = clamp_exponent<float>(side.eta * natural(log));
      const float power = fast_exp2(a * 1.4426950408889634f);
      const float series = a * first_exponential(a);
      return {power, (absolute(a) < 0.5f ? series : power - 1.0f) * side.inverse};
    }
  }
};

template <>
struct DeviceLog<double> {
  static NN_HD double of(double t) { return ::log1p(t); }
  static NN_HD double natural(double log) { return log; }
  template <bool kCareful>
  static NN_HD PowerPsi<double> psi(double log, const Side<double>& side) {
    const ExpPair<double> pair = exp_pair<double>(clamp_exponent<double>(side.eta * log));
    return {pair.exp, pair.expm1 * side.inverse};
  }
};

// Whether a group takes the careful form: it also covers the shifted transform's linear zone (active = 0).
template <class S>
NN_HD bool needs_care(const Exponents<S>& e, bool frozen) {
  return frozen || has_small_exponent(e) || e.active_pos == S(0) || e.active_neg == S(0);
}

// The side of h; without care both sides are known to be active, which saves a selection and a product.
template <bool kCareful, class V>
NN_HD Side<V> device_side(V h, const Exponents<V>& e) {
  if constexpr (kCareful) return side_of(h, e);
  const bool negative = h < V(0);
  return {negative ? e.eta_neg : e.eta_pos, negative ? e.inverse_neg : e.inverse_pos, V(1)};
}

// The angle is taken from the word as a signed number: the same angle, within half a turn of zero, where the
// special-function sine is at its best.
NN_HD NormalPair<float> fast_box_muller(uint32_t radius_word, uint32_t angle_word) {
  const float uniform = static_cast<float>(radius_word) * 2.3283064365386963e-10f + 1.1641532182693481e-10f;
  const float radius = fast_sqrt(fast_log2(::fminf(uniform, 0.99999994f)) * -1.3862943611198906f);
  const float angle =
      static_cast<float>(static_cast<int32_t>(angle_word)) * 1.4629180792671596e-09f + 7.314590396335798e-10f;
  return {radius * fast_cos(angle), radius * fast_sin(angle)};
}

// The keys of all rounds, made once a group: as cheap as a register each, where making them anew for every four elements
// would cost as much as half of the generator.
struct PhiloxSchedule {
  uint32_t key[2 * kPhiloxRounds];

  NN_HD explicit PhiloxSchedule(uint64_t seed) {
    PhiloxKeys keys{uint32_t(seed), uint32_t(seed >> 32)};
    for (int round = 0; round < kPhiloxRounds; ++round) {
      key[2 * round] = keys.first, key[2 * round + 1] = keys.second;
#if defined(__CUDA_ARCH__)
      // or the compiler would make them anew all the same
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

NN_HD NormalPair<float> normal_pair(uint32_t radius_word, uint32_t angle_word, float) {
  return fast_box_muller(radius_word, angle_word);
}
NN_HD NormalPair<double> normal_pair(uint32_t radius_word, uint32_t angle_word, double) {
  return box_muller_double(radius_word, angle_word);
}

// The normals of elements 4 quad .. 4 quad + 3.
template <class Real>
NN_HD void quad_normals(const PhiloxSchedule& schedule, uint32_t stream, uint64_t quad, Real* z) {
  const PhiloxWords w = philox_rounds({{uint32_t(quad), uint32_t(quad >> 32), stream, 0u}}, ScheduledKeys(schedule));
  const auto even = normal_pair(w.word[0], w.word[1], Real()), odd = normal_pair(w.word[2], w.word[3], Real());
  z[0] = even.first, z[1] = even.second, z[2] = odd.first, z[3] = odd.second;
}

}  // namespace
}  // namespace normnorm
