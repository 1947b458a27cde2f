// The five rounds of the forward pass and the two of the backward pass, for one element and for one group's totals.
// Every rung of the ladder is made of these; what differs between rungs is where a group lives between the rounds.
#pragma once

#include "../core/device_math.h"
#include "../core/lmbda.h"
#include "../core/statistics.h"
#include "device.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Round 1: moments. Taken around the rounded mean, so that an offset of the data costs no digits.
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
  return {mean, low, fast_rsqrt((variance < Real(0) ? Real(0) : variance) + eps)};
}

// Round 2: adds an element's terms of the lambda estimate to sums[4]; returns the logarithm of 1+|h|, signed as h.
template <class Real>
__device__ inline Real lambda_round(Real h, Real* sums) {
  const Real t = absolute(h);
  const Real log = DeviceLog<Real>::of(t);
  const Real signed_log = signed_as(log, h);
  const LambdaTerms<Real> term = lambda_terms_but_squares<Real>(h, t, DeviceLog<Real>::natural(log));
  sums[0] += term.slope;
  sums[1] += DeviceLog<Real>::natural(signed_log);
  sums[2] += term.shift;
  sums[3] += term.curvature;
  return signed_log;
}

template <class Real>
struct Estimate {
  Real lmbda, slope, shift, curvature;
};

// The squares that round 2 leaves out have the mean v r^2 = 1 - eps r^2.
template <class Real>
__device__ inline Estimate<Real> finish_lambda(const Real* sums, Real rstd, Real inverse_count, Real alpha, int order,
                                               Real eps, Real root_eps) {
  const LambdaTerms<Real> mean{sums[0] * inverse_count, sums[1] * inverse_count, sums[2] * inverse_count,
                               sums[3] * inverse_count + Real(3) * (Real(1) - eps * rstd * rstd)};
  const LambdaEstimate<Real> step = newton_step<Real>(mean, alpha, order, root_eps);
  return {step.lmbda, mean.slope, mean.shift, step.curvature};
}

// Round 3: x from round 2's signed logarithm.
template <bool kCareful, class Real>
__device__ inline Real transform_round(Real signed_log, const Exponents<Real>& e) {
  const Side<Real> side = device_side<kCareful>(signed_log, e);
  return signed_as(DeviceLog<Real>::template psi<kCareful>(absolute(signed_log), side).magnitude, signed_log);
}

// Whether a group is to be treated with care is known only at run time.
template <int N, class Real>
__device__ __forceinline__ void transform_chunk(Real (&signed_log)[N], const Exponents<Real>& e, bool careful) {
  if (careful) {
#pragma unroll
    for (int j = 0; j < N; ++j) signed_log[j] = transform_round<true>(signed_log[j], e);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) signed_log[j] = transform_round<false>(signed_log[j], e);
  }
}

// The backward pass's constants of a group, read from the statistics tensor.
template <class Real>
struct GroupConstants {
  Real mean, rstd, shift, noise_scale;  // h = (u - mean) rstd + shift
  Exponents<Real> exponents;
  LambdaGradient<Real> lmbda;
  bool careful;

  __device__ Real standardize(Real u) const { return (u - mean) * rstd + shift; }
};

template <class Real>
__device__ inline GroupConstants<Real> load_constants(const Real* stats, int64_t group, int64_t groups, Real alpha,
                                                      int order, Real transform_eps, bool frozen) {
  const auto row = [&](StatRow r) { return stats[r * groups + group]; };
  GroupConstants<Real> c;
  c.mean = row(kMean);
  c.rstd = row(kRstd);
  c.shift = -row(kMeanLow) * c.rstd;
  c.noise_scale = row(kNoiseScale);
  const Real lmbda = row(kLmbda);
  c.exponents = make_exponents<Real>(lmbda, transform_eps);
  c.careful = needs_care(c.exponents, frozen);
  c.lmbda = frozen ? LambdaGradient<Real>{Real(0), Real(0), Real(0), Real(2)}
                   : lambda_gradient<Real>(lmbda, row(kSlope), row(kShift), row(kCurvature), alpha, order);
  return c;
}

// The backward reduction: adds an element's terms to sums[5]; G = gradient times weight.
template <class Real>
struct Slopes {
  Real through_h;  // G psi_h
  Real w;          // n dlambda/dh
  Real x;
};

template <bool kCareful, class Real>
__device__ inline Slopes<Real> gradient_round(Real h, Real weighted, const GroupConstants<Real>& c, Real* sums) {
  const Real t = absolute(h);
  const Real log = DeviceLog<Real>::of(t);
  const Real l = DeviceLog<Real>::natural(log);
  const Side<Real> side = device_side<kCareful>(h, c.exponents);
  const PowerPsi<Real> psi = DeviceLog<Real>::template psi<kCareful>(log, side);
  const Real reciprocal = fast_reciprocal(t + Real(1));
  const PsiSlopes<Real> slope = psi_slopes<kCareful, Real>(l, reciprocal, psi.power, psi.magnitude, side);
  const Real through_h = weighted * slope.psi_h;
  const Real w = lambda_weight<Real>(h, t, l, reciprocal, c.lmbda);
  sums[0] += through_h;
  sums[1] += through_h * h;
  sums[2] += weighted * slope.psi_lambda;
  sums[3] += w;
  sums[4] += w * h;
  return {through_h, w, signed_as(psi.magnitude, h)};
}

// du = rstd (G psi_h + Lambda w - offset - slope h); the constants have absorbed rstd and their signs.
template <class Real>
struct InputGradient {
  Real rstd, lmbda, offset, slope;
  __device__ Real operator()(Real through_h, Real w, Real h) const {
    return rstd * through_h + (lmbda * w + (slope * h + offset));
  }
};

template <class Real>
__device__ inline InputGradient<Real> finish_gradient(const Real* sums, Real inverse_count, Real rstd, bool frozen) {
  if (frozen) return {rstd, Real(0), Real(0), Real(0)};
  const Real lmbda = sums[2] * inverse_count;
  return {rstd, rstd * lmbda, -rstd * (sums[0] * inverse_count + lmbda * (sums[3] * inverse_count)),
          -rstd * (sums[1] * inverse_count + lmbda * (sums[4] * inverse_count))};
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
