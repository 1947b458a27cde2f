// Reductions over one group, and the statistics and constants that follow from them.
//
// A group is cut into parts that depend on the shape alone, not on the number of threads, and their sums are added from
// the first to the last: results are bitwise the same for any number of threads.
#pragma once

#include "../common/stats.h"
#include "../math/moments.h"
#include "loops.h"
#include "workspace.h"

namespace normnorm {
namespace {

// part(0) + part(1) + ..., in that order; Part has add().
template <class Part, class F>
inline Part reduce_parts(const cpu::ThreadPool& pool, bool parallel, int64_t count, F part) {
  Part total{};
  if (!parallel || pool.threads <= 1 || count == 1) {
    for (int64_t i = 0; i < count; ++i) total.add(part(i));
    return total;
  }
  Buffer<Part> parts(count);
  for_range(pool, true, count, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) parts[i] = part(i);
  });
  for (int64_t i = 0; i < count; ++i) total.add(parts[i]);
  return total;
}

// Sums over one part of a group, in double.
template <int kCount>
struct Sums {
  double value[kCount] = {};
  NN_HD void add(const Sums& other) {
    for (int i = 0; i < kCount; ++i) value[i] += other.value[i];
  }
};

// Whether the call is for one round, which leaves a group's sums to its caller.
template <int kCount>
inline bool left_to_caller(const cpu::Problem& p, int64_t group, const Sums<kCount>& sums) {
  if (p.round == Round::kAll) return false;
  for (int i = 0; i < kCount; ++i) p.sums[i * p.geometry.groups() + group] = sums.value[i];
  return true;
}

struct MomentsPart {
  Moments moments;
  NN_HD void add(const MomentsPart& other) { moments = merge(moments, other.moments); }
};

// One group's column of the statistics tensor. The forward pass uses the values rounded to T, the compute dtype, which
// the backward pass will read.
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

  // From the totals of LambdaSums, which lack t^2: its mean is the variance times r^2, with the rounded r that the other
  // terms have. A given noise scale is kept.
  void set_lambda(const Sums<4>& sums, double count, double variance, const cpu::Problem& p) {
    const double rstd = double(get(kRstd));
    const LambdaTerms<double> mean{sums.value[0] / count, sums.value[1] / count, sums.value[2] / count,
                                   sums.value[3] / count + variance * rstd * rstd};
    const auto estimate = newton_step<double>(mean, p.settings);
    set(kLmbda, estimate.lmbda);
    set(kMeanHd, mean.hd);
    set(kMeanD, mean.d);
    set(kCurvature, estimate.curvature);
    if (!p.noise.given_scale) set(kNoiseScale, 0);
  }

  TransformConstants<T> transform(const cpu::Problem& p) const {
    const T rstd = get(kRstd);
    return {{get(kMean), rstd, -get(kMeanLow) * rstd}, make_exponents<T>(get(kLmbda), p.settings.as<T>())};
  }

  LambdaGradient<T> gradient(const cpu::Problem& p) const {
    if (p.frozen) return {T(0), T(0), T(0), T(2)};
    return lambda_gradient<T>(get(kLmbda), get(kMeanHd), get(kMeanD), get(kCurvature), p.settings.as<T>());
  }

 private:
  T* base_ = nullptr;
  int64_t stride_ = 0;
};

// Whether the backward pass takes psi_slopes() with kSeries.
template <class T>
inline bool needs_series(const cpu::Problem& p, const Exponents<T>& e) {
  return p.frozen || p.settings.transform_eps > 0 || has_small_exponent(e, T(p.settings.small_exponent));
}

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

// The constants of the input's gradient from the backward reduction's sums (the first five of GradientSums) over a
// group of `count` elements.
template <class T>
NN_HD InputGradient<T> input_gradient_constants(const Sums<5>& sums, double count, double rstd, bool frozen) {
  if (frozen) return {T(rstd), T(0), T(0), T(0)};
  const double* v = sums.value;
  const double each = 1.0 / count, lmbda = v[2] * each, scale = rstd * each;
  return {T(rstd), T(rstd * lmbda), T(scale * (v[0] + lmbda * v[3])), T(scale * (v[1] + lmbda * v[4]))};
}

// The same for Round::kGradient, from means.
template <class T>
NN_HD InputGradient<T> given_input_gradient(const cpu::Problem& p, int64_t group, double rstd) {
  Sums<5> means;
  for (int i = 0; i < 5; ++i) means.value[i] = p.sums[i * p.geometry.groups() + group];
  return input_gradient_constants<T>(means, 1.0, rstd, p.frozen);
}

}  // namespace
}  // namespace normnorm
