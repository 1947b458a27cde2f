// Rows of the statistics tensor that a forward pass saves and its backward pass reads, of shape (kStatRows, groups);
// normnorm/statistics.py and triton_kernels have the same.
#pragma once

#include "../math/macros.h"

namespace normnorm {

enum StatRow : int {
  kMean = 0,        // the group's mean, rounded to the statistics' dtype
  kMeanLow = 1,     // what rounding the mean lost: mean(u - kMean)
  kRstd = 2,        // (biased variance + eps)^-1/2
  kLmbda = 3,       // the power parameter
  kNoiseScale = 4,  // s = mean|x - mean(x)|, 0 where it was not computed
  kMeanHd = 5,      // A = mean(h d)
  kMeanD = 6,       // D = mean(d)
  kCurvature = 7,   // Q, the denominator of the Newton step
  kStatRows = 8,
};

namespace {

// 0, or NaN where Real holds the variance as infinite. It is added to kRstd, which would be 0, so that a group whose
// variance overflows gives NaN instead of zeros.
template <class Real>
NN_HD Real in_range(Real variance) {
  return variance - variance;
}

}  // namespace

}  // namespace normnorm
