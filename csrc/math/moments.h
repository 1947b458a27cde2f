// Mean and centred sum of squares of a part of a group, and their merge without cancellation (Chan, Golub and LeVeque
// 1979).
//
// A part is summed around a rounded centre near its mean, so that an offset of the data costs no digits:
// mean = centre + sum(c)/n and m2 = sum(c^2) - sum(c)^2/n with c = u - centre.
#pragma once

#include "macros.h"

namespace normnorm {
namespace {

struct Moments {
  double count = 0, mean = 0, low = 0, m2 = 0;  // the mean is mean + low, since float64 data need more than a double
};

// mean + increment as an unevaluated sum of two doubles.
NN_HD void add_to_mean(Moments& m, double increment) {
  const double sum = m.mean + increment;
  const double rest = sum - m.mean;
  m.low = (m.mean - (sum - rest)) + (increment - rest);
  m.mean = sum;
}

NN_HD Moments recentred_moments(double count, double centre, double sum, double sum_of_squares) {
  const double offset = sum / count;
  const double m2 = sum_of_squares - sum * offset;
  Moments m{count, centre, 0, m2 < 0 ? 0 : m2};
  add_to_mean(m, offset);
  return m;
}

NN_HD Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0) return b;
  if (b.count == 0) return a;
  const double count = a.count + b.count;
  const double delta = (b.mean - a.mean) + (b.low - a.low);
  const double share = b.count / count;
  Moments m{count, a.mean, 0, a.m2 + b.m2 + delta * delta * a.count * share};
  add_to_mean(m, a.low + delta * share);
  return m;
}

}  // namespace
}  // namespace normnorm
