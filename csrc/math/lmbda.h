// The estimate of a group's power parameter lmbda, and its gradient.
//
// One Newton step from lmbda = 1 on the Yeo-Johnson negative log-likelihood of the standardized values h.
// With t = |h|, l = log(1+t), q = (1+t) l, d = q - t, e = q (q + t (l-4)) + 3 t^2 and means over the group:
//   A = mean(h d)   B = mean(sign(h) l)   D = mean(d)   E = mean(e)
//   L'(1) = A - B   L''(1) + sqrt(eps) = Q = max(E - D^2 - 2 A^2, 0) + sqrt(eps)   lmbda = 1 - alpha (A-B)/Q
#pragma once

#include "lanes.h"
#include "settings.h"

namespace normnorm {
namespace {

template <class V>
struct LambdaTerms {
  V hd;   // h d
  V log;  // sign(h) l
  V d;
  V e;
};

// Sums of the terms over elements, of which h = 0 adds nothing. e is summed as 2 d^2 - q l and lacks its t^2, whose mean
// follows from the variance. The base of the logarithms has the natural logarithm `unit`.
template <class V>
struct LambdaSums {
  V hd{}, log{}, d{}, squares{}, products{};

  NN_HD void add(V h, V t, V l, V signed_log, ScalarOf<V> unit) {
    const V q = (t + ScalarOf<V>(1)) * l;
    const V term = q * unit - t;
    hd += h * term;
    log += signed_log;
    d += term;
    squares += term * term;
    products += q * l;
  }
  NN_HD void add(const LambdaSums& other) {
    hd += other.hd, log += other.log, d += other.d, squares += other.squares, products += other.products;
  }
  NN_HD LambdaTerms<V> totals(ScalarOf<V> unit) const {
    return {hd, log * unit, d, squares * ScalarOf<V>(2) - products * (unit * unit)};
  }
};

template <class S>
struct LambdaEstimate {
  S lmbda;
  S curvature;  // Q
};

template <class S>
NN_HD LambdaEstimate<S> newton_step(const LambdaTerms<S>& mean, Settings<S> s) {
  const S variance = mean.e - mean.d * mean.d - S(2) * mean.hd * mean.hd;
  // not a maximum, which would drop a NaN
  const S q = (variance < S(0) ? S(0) : variance) + s.root_eps;
  const S first = mean.hd - mean.log;
  return {S(1) - s.alpha * (s.order == 1 ? first : quotient(first, q)), q};
}

// The constants of w in n dlmbda/dh_i = w(h_i), n being the group's size:
//   w = c_e [(1+2t) l - t] + c_r/(1+t) + c_o sign(h) {((3+4t) l - (2+4t+2D)) l + 2t}
template <class V>
struct LambdaGradient {
  V c_e, c_r, c_o;
  V two_d;  // 2 + 2 D
};

template <class S>
NN_HD LambdaGradient<S> lambda_gradient(S lmbda, S mean_hd, S mean_d, S curvature, Settings<S> s) {
  const S two_d = S(2) + S(2) * mean_d;
  if (s.order == 1) return {-s.alpha, s.alpha, S(0), two_d};
  const S inverse = quotient(S(1), curvature), c_r = s.alpha * inverse, c_o = (S(1) - lmbda) * inverse;
  return {-(c_r + S(4) * mean_hd * c_o), c_r, c_o, two_d};
}

// w by Horner's rule in t.
template <class V>
NN_HD V lambda_weight(V h, V t, V l, V reciprocal, const LambdaGradient<V>& c) {
  using S = ScalarOf<V>;
  const V odd = h < splat<V>(0) ? -c.c_o : c.c_o;
  const V y = l * S(2) - S(1);
  const V of_t = y * (odd * y + c.c_e) + odd;
  const V of_log = odd * (l * S(3) - c.two_d) + c.c_e;
  return t * of_t + (l * of_log + c.c_r * reciprocal);
}

}  // namespace
}  // namespace normnorm
