// The five rounds of the forward pass and the two of the backward pass, for one element and for one group's totals. All
// tiers use them; the tiers differ in where a group is kept between the rounds.
#pragma once

#include "../math/device_math.h"
#include "../common/stats.h"
#include "runtime.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Round 1: moments around the rounded mean, so that an offset of the data costs no precision.
template <class Real>
struct Moments1 {
  Real mean, mean_low, rstd;
  // h of a centred element c = u - mean
  __device__ Real standardize(Real c) const { return c * rstd - mean_low * rstd; }
};

template <class Real>
__device__ inline Moments1<Real> finish_moments(Real mean, Real sum, Real squares, Real inverse_count, Real eps) {
  const Real low = sum * inverse_count;
  const Real variance = squares * inverse_count - low * low;
  // `< 0 ? 0` and not a maximum: a NaN group must stay NaN
  return {mean, low, fast_rsqrt((variance < Real(0) ? Real(0) : variance) + eps) + in_range(variance)};
}

template <class Real>
struct Estimate {
  Real lmbda, mean_hd, mean_d, curvature;
};

// From the totals of LambdaSums, which lack t^2: its mean is v r^2 = 1 - eps r^2.
template <class Real>
__device__ inline Estimate<Real> finish_lambda(const Real* sums, Real rstd, Real inverse_count,
                                               Settings<Real> s) {
  const LambdaTerms<Real> mean{sums[0] * inverse_count, sums[1] * inverse_count, sums[2] * inverse_count,
                               sums[3] * inverse_count + (Real(1) - s.eps * rstd * rstd)};
  const LambdaEstimate<Real> step = newton_step<Real>(mean, s);
  return {step.lmbda, mean.hd, mean.d, step.curvature};
}

// Round 3: x from round 2's signed logarithm.
template <PrecisionPath kPath, class Real>
__device__ inline Real transform_round(Real signed_log, const Exponents<Real>& e) {
  if constexpr (kPath == PrecisionPath::kSeries) {
    const Side<Real> side = side_of(signed_log, e);
    const Real a = clamp_exponent<Real>(side.eta * (absolute(signed_log) * DeviceLog<Real>::kUnit));
    return signed_as(DeviceLog<Real>::exact_power(a).minus_one * side.inverse, signed_log);
  } else {
    const SignedExponent<Real> exponent = signed_exponent(e, Real(1));
    return plain_power_psi<kPath == PrecisionPath::kBounded>(signed_log, exponent.inverse(signed_log), exponent.tilt).psi;
  }
}

template <PrecisionPath kPath, int N, class Real>
__device__ __forceinline__ void transform_chunk(Real (&signed_log)[N], const Exponents<Real>& e) {
#pragma unroll
  for (int j = 0; j < N; ++j) signed_log[j] = transform_round<kPath>(signed_log[j], e);
}

// A group's precision path is known only at run time; f(tag) is compiled once for each.
template <PrecisionPath kPath>
struct PathTag {
  static constexpr PrecisionPath value = kPath;
};
template <class F>
__device__ __forceinline__ void with_path(PrecisionPath path, F f) {
  if (path == PrecisionPath::kPlain) f(PathTag<PrecisionPath::kPlain>());
  else f(PathTag<PrecisionPath::kSeries>());
}
// The same where statistics may be frozen.
template <class F>
__device__ __forceinline__ void with_any_path(PrecisionPath path, F f) {
  if (path == PrecisionPath::kBounded) f(PathTag<PrecisionPath::kBounded>());
  else with_path(path, f);
}

// A group's constants of the backward pass and the output, from the statistics tensor.
template <class Real>
struct GroupConstants {
  Real mean, rstd, shift, noise_scale;  // h = (u - mean) rstd + shift
  Exponents<Real> exponents;
  LambdaGradient<Real> lmbda;
  PrecisionPath path;

  __device__ Real standardize(Real u) const { return fused(u - mean, rstd, shift); }
};

// row(r) is the group's statistic r.
template <class Real, class Row>
__device__ inline GroupConstants<Real> group_constants(Row row, Settings<Real> s, bool frozen) {
  GroupConstants<Real> c;
  c.mean = row(kMean);
  c.rstd = row(kRstd);
  c.shift = -row(kMeanLow) * c.rstd;
  c.noise_scale = row(kNoiseScale);
  const Real lmbda = row(kLmbda);
  c.exponents = make_exponents<Real>(lmbda, s);
  c.path = precision_path(c.exponents, s, frozen);
  c.lmbda = frozen ? LambdaGradient<Real>{Real(0), Real(0), Real(0), Real(2)}
                   : lambda_gradient<Real>(lmbda, row(kMeanHd), row(kMeanD), row(kCurvature), s);
  return c;
}
template <class Real>
__device__ inline GroupConstants<Real> load_constants(const Real* stats, int64_t group, int64_t groups,
                                                      Settings<Real> s, bool frozen) {
  return group_constants([&](StatRow r) { return stats[r * groups + group]; }, s, frozen);
}

// The backward reduction: gradient_round() adds an element's terms to sums[5]; natural_sums() converts these to natural
// logarithms. g may lack a weight that is the same for the whole group: finish_gradient() multiplies by it.
template <class Real>
struct Slopes {
  Real through_h;  // g psi_h
  Real w;          // n dlambda/dh
  Real x;          // in the unit of the logarithms
};

// The signed exponent of gradient_round(): psi in the unit of the logarithms.
template <class Real>
__device__ inline SignedExponent<Real> gradient_exponent(const Exponents<Real>& e) {
  return signed_exponent(e, Real(1) / DeviceLog<Real>::kUnit);
}

// The slopes that depend on the precision path: psi_h, and the others in the unit of the logarithms.
template <class Real>
struct PowerSlopes {
  Real psi_h, psi_lambda, x;
};

template <class Real>
__device__ __forceinline__ PowerSlopes<Real> plain_slopes(Real h, Real log, Real reciprocal,
                                                          const SignedExponent<Real>& exponent) {
  const Real signed_log = signed_as(log, h);
  const Real inverse = exponent.inverse(h);
  const PowerPsi<Real> p = plain_power_psi<false>(signed_log, inverse, exponent.tilt);
  return {p.power * reciprocal, fused(p.power, signed_log, -p.psi) * inverse, p.psi};
}

template <class Real>
__device__ __forceinline__ PowerSlopes<Real> series_slopes(Real h, Real log, Real reciprocal,
                                                            const Exponents<Real>& exponents) {
  constexpr Real unit = DeviceLog<Real>::kUnit;
  const Side<Real> side = side_of(h, exponents);
  const Real l = log * unit;
  const PowerPair<Real> power = DeviceLog<Real>::exact_power(clamp_exponent<Real>(side.eta * l));
  const Real magnitude = power.minus_one * side.inverse;
  const PsiSlopes<Real> slope = psi_slopes<true, Real>(l, reciprocal, power.power, magnitude, side);
  return {slope.psi_h, slope.psi_lambda * (Real(1) / (unit * unit)), signed_as(magnitude, h) * (Real(1) / unit)};
}

template <class Real>
__device__ __forceinline__ Slopes<Real> gradient_round(PrecisionPath path, Real h, Real g,
                                                       const SignedExponent<Real>& exponent,
                                                       const Exponents<Real>& exponents,
                                                       const LambdaGradient<Real>& lmbda, Real* sums) {
  const Real t = absolute(h);
  const Real log = DeviceLog<Real>::of(t);
  const Real reciprocal = fast_reciprocal(t + Real(1));
  const PowerSlopes<Real> p = path == PrecisionPath::kPlain ? plain_slopes(h, log, reciprocal, exponent)
                                                   : series_slopes(h, log, reciprocal, exponents);
  const Real through_h = rounded_product(g, p.psi_h);
  const Real w = device_lambda_weight(h, t, log, reciprocal, lmbda);
  sums[0] += through_h;
  sums[1] = fused(through_h, h, sums[1]);
  sums[2] = fused(g, p.psi_lambda, sums[2]);
  sums[3] += w;
  sums[4] = fused(w, h, sums[4]);
  return {through_h, w, p.x};
}

constexpr int kGradientSums = 7;  // the five of gradient_round(), then of the bias and the weight: g, g x

template <int K, class Real>
__device__ inline void natural_sums(Real (&sums)[K]) {
  constexpr Real unit = DeviceLog<Real>::kUnit;
  sums[2] *= unit * unit;
  if constexpr (K == kGradientSums) sums[6] *= unit;
}

// du = rstd (G psi_h + Lambda w - offset - slope h); the constants include rstd and the signs.
template <class Real>
struct InputGradient {
  Real through, lmbda, offset, slope;
  __device__ Real operator()(Real through_h, Real w, Real h) const {
    return fused(through, through_h, fused(lmbda, w, fused(slope, h, offset)));
  }
};

template <class Real>
__device__ inline InputGradient<Real> finish_gradient(const Real* sums, Real weight, Real inverse_count, Real rstd,
                                                      bool frozen) {
  if (frozen) return {rstd * weight, Real(0), Real(0), Real(0)};
  const Real share = weight * inverse_count, lmbda = sums[2] * share;
  return {rstd * weight, rstd * lmbda, -rstd * (sums[0] * share + lmbda * (sums[3] * inverse_count)),
          -rstd * (sums[1] * share + lmbda * (sums[4] * inverse_count))};
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
