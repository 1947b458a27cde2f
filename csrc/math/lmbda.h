// The estimate of a group's power parameter lmbda, and its gradient.
//
// One Newton step from lmbda = 1 on the Yeo-Johnson negative log-likelihood of the standardized values h.
// With t = |h|, l = log(1+t), q = (1+t) l, d = q - t, e = q (q + t (l-4)) + 3 t^2 and means over the group:
//   A = mean(h d)   B = mean(sign(h) l)   D = mean(d)   E = mean(e)
//   L'(1) = A - B   L''(1) + sqrt(eps) = Q = max(E - D^2 - 2 A^2, 0) + sqrt(eps)   lmbda = 1 - alpha (A-B)/Q
#pragma once

#include "lanes.h"

namespace normnorm {
namespace {

template <class V>
struct LambdaTerms {
  V hd;   // h d
  V log;  // sign(h) l
  V d;
  V e;
};

// Omits the 3 t^2 of e: its mean, 3 mean(h^2), follows from the variance.
template <class V>
NN_HD LambdaTerms<V> lambda_terms_but_squares(V h, V t, V l) {
  const V q = t * l + l;
  const V d = q - t;
  return {h * d, with_sign_of(l, h), d, q * (t * (l - ScalarOf<V>(4)) + q)};
}

template <class V>
NN_HD LambdaTerms<V> lambda_terms(V h, V t, V l) {
  LambdaTerms<V> term = lambda_terms_but_squares<V>(h, t, l);
  term.e = term.e + t * t * ScalarOf<V>(3);
  return term;
}

template <class S>
struct LambdaEstimate {
  S lmbda;
  S curvature;  // Q
};

// root_eps = sqrt(eps) is an argument because in float64 it would dominate a GPU kernel's time on a short group.
template <class S>
NN_HD LambdaEstimate<S> newton_step(const LambdaTerms<S>& mean, S alpha, int order, S root_eps) {
  const S variance = mean.e - mean.d * mean.d - S(2) * mean.hd * mean.hd;
  // not a maximum, which would drop a NaN
  const S q = (variance < S(0) ? S(0) : variance) + root_eps;
  const S first = mean.hd - mean.log;
  return {S(1) - alpha * (order == 1 ? first : first / q), q};
}

template <class S>
NN_HD LambdaEstimate<S> estimate_lambda(const LambdaTerms<S>& mean, S alpha, int order, S eps) {
  return newton_step<S>(mean, alpha, order, S(::sqrt(double(eps))));
}

// The constants of w in n dlmbda/dh_i = w(h_i), n being the group's size:
//   w = c_e [(1+2t) l - t] + c_r/(1+t) + c_o sign(h) {((3+4t) l - (2+4t+2D)) l + 2t}
template <class V>
struct LambdaGradient {
  V c_e, c_r, c_o;
  V two_d;  // 2 + 2 D
};

template <class S>
NN_HD LambdaGradient<S> lambda_gradient(S lmbda, S mean_hd, S mean_d, S curvature, S alpha, int order) {
  const S two_d = S(2) + S(2) * mean_d;
  if (alpha == S(0)) return {S(0), S(0), S(0), two_d};
  if (order == 1) return {-alpha, alpha, S(0), two_d};
  const S kap = (lmbda - S(1)) / alpha;
  const S c_r = alpha / curvature;
  return {-c_r * (S(1) - S(4) * mean_hd * kap), c_r, -c_r * kap, two_d};
}

template <class V>
NN_HD V lambda_weight(V h, V t, V l, V reciprocal, const LambdaGradient<V>& c) {
  using S = ScalarOf<V>;
  const V four_t = t * S(4);
  const V even = (t * S(2) + S(1)) * l - t;
  const V odd = ((four_t + S(3)) * l - (four_t + c.two_d)) * l + t * S(2);
  const V signed_odd = h < splat<V>(0) ? -odd : odd;
  return c.c_e * even + (c.c_r * reciprocal + c.c_o * signed_odd);
}

}  // namespace
}  // namespace normnorm
