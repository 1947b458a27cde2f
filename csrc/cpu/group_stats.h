// The statistics of one group as the passes use them, and their way in and out of the statistics tensor.
#pragma once

#include "../common/stats.h"
#include "../math/moments.h"
#include "backward_passes.h"
#include "problem.h"

namespace normnorm {
namespace {

// Sums of one part of a group, in double, in the order of the formulae.
template <int kCount>
struct Sums {
  double value[kCount] = {};
  NN_HD void add(const Sums& other) {
    for (int i = 0; i < kCount; ++i) value[i] += other.value[i];
  }
};

struct MomentsPart {
  Moments moments;
  NN_HD void add(const MomentsPart& other) { moments = merge(moments, other.moments); }
};

// One column of the statistics tensor. T is the compute dtype: what the backward pass will read is what is
// used.
template <class T>
class GroupStats {
 public:
  GroupStats() = default;
  GroupStats(const cpu::Problem& p, int64_t group)
      : base_(static_cast<T*>(p.stats) + group), stride_(p.geometry.groups()) {}

  T get(StatRow row) const { return base_[row * stride_]; }
  void set(StatRow row, double value) { base_[row * stride_] = T(value); }

  void set_moments(const Moments& m, double eps) {
    set(kMean, m.mean);
    set(kMeanLow, (m.mean - double(get(kMean))) + m.low);
    const double variance = m.m2 / m.count;
    set(kRstd, 1.0 / ::sqrt(variance + eps) + in_range(T(variance)));
  }

  // sums: the totals of lambda_terms() in their order
  void set_lambda(const Sums<4>& sums, double count, const cpu::Problem& p) {
    const LambdaTerms<double> mean{sums.value[0] / count, sums.value[1] / count, sums.value[2] / count,
                                   sums.value[3] / count};
    const auto estimate = estimate_lambda<double>(mean, p.alpha, p.order, p.eps);
    set(kLmbda, estimate.lmbda);
    set(kMeanHd, mean.hd);
    set(kMeanD, mean.d);
    set(kCurvature, estimate.curvature);
    set(kNoiseScale, 0);
  }

  TransformConstants<T> transform(const cpu::Problem& p) const {
    const T rstd = get(kRstd);
    return {{get(kMean), rstd, -get(kMeanLow) * rstd}, make_exponents<T>(get(kLmbda), T(p.transform_eps))};
  }

  LambdaGradient<T> gradient(const cpu::Problem& p) const {
    if (p.frozen) return {T(0), T(0), T(0), T(2)};
    return lambda_gradient<T>(get(kLmbda), get(kMeanHd), get(kMeanD), get(kCurvature), T(p.alpha), p.order);
  }

 private:
  T* base_ = nullptr;
  int64_t stride_ = 0;
};

// The same constants in every lane.
template <class V, class T>
NN_HD TransformConstants<V> broadcast(const TransformConstants<T>& c) {
  const auto& s = c.standardize;
  const auto& e = c.exponents;
  return {{splat<V>(s.mean), splat<V>(s.rstd), splat<V>(s.shift)},
          {splat<V>(e.eta_pos), splat<V>(e.eta_neg), splat<V>(e.inverse_pos), splat<V>(e.inverse_neg),
           splat<V>(e.active_pos), splat<V>(e.active_neg)}};
}

template <class V, class T>
NN_HD LambdaGradient<V> broadcast(const LambdaGradient<T>& c) {
  return {splat<V>(c.c_e), splat<V>(c.c_r), splat<V>(c.c_o), splat<V>(c.two_d)};
}

// The constants of the input gradient from the totals of the backward reduction; `weight` is what was
// factored out.
template <class T>
NN_HD InputGradient<T> input_gradient_constants(const double psi_h, const double psi_h_h, const double lmbda,
                                                const double w, const double w_h, double count, double rstd,
                                                double weight, bool frozen) {
  if (frozen) return {T(rstd * weight), T(0), T(0), T(0)};
  const double each = 1.0 / count, lam = lmbda * each, scale = rstd * each;
  return {T(rstd * weight), T(rstd * lam), T(scale * (psi_h + lam * w)), T(scale * (psi_h_h + lam * w_h))};
}

}  // namespace
}  // namespace normnorm
