// The statistics tensor that a forward pass saves and its backward pass reads: shape (kStatRows, groups).
#pragma once

#include "macros.h"

namespace normnorm {

enum StatRow : int {
  kMean = 0,        // the group's mean, rounded to the statistics' dtype
  kMeanLow = 1,     // what rounding the mean lost: mean(u - kMean)
  kRstd = 2,        // (biased variance + eps)^-1/2
  kLmbda = 3,       // the power parameter
  kNoiseScale = 4,  // s = mean|x - mean(x)|, 0 where it was not computed
  kSlope = 5,       // A = mean(h d)
  kShift = 6,       // D = mean(d)
  kCurvature = 7,   // Q, the denominator of the Newton step
  kStatRows = 8,
};

namespace {

// 0, and NaN of a variance that Real holds as infinite. Added to kRstd, which would be 0: a group beyond the range comes
// out as NaN and not as zeros.
template <class Real>
NN_HD Real in_range(Real variance) {
  return variance - variance;
}

}  // namespace

}  // namespace normnorm
