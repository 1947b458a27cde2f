// The settings of the standardization, the estimate of lmbda and the transform, for all kernels.
#pragma once

#include <cfloat>
#include <cmath>

namespace normnorm {

template <class S>
struct Settings {
  S eps = S(1e-5), root_eps = S(3.1622776601683795e-3);  // root_eps = sqrt(eps): a root in float64 is slow on a GPU
  S alpha = S(1);
  S transform_eps = S(0);
  int order = 2;
  S small_exponent = S(0.25);  // below it powers are computed by series (transform.h)

  // Whether the kernels can compute with these values; normnorm/checks.py has the error message for each rule.
  bool valid() const {
    return eps >= FLT_MIN && eps <= FLT_MAX && std::isfinite(alpha) && std::isfinite(transform_eps) &&
           transform_eps >= 0 && (order == 1 || order == 2);
  }

  template <class T>
  Settings<T> as() const {
    return {T(eps), T(root_eps), T(alpha), T(transform_eps), order, T(small_exponent)};
  }
};

}  // namespace normnorm
