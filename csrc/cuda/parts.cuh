// Second reductions: partial sums of the parameters' gradients to the gradients, and the running statistics.
#pragma once

#include "../common/stats.h"
#include "storage.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kFoldColumns = 32, kFoldRows = 8;  // of a block

// out[i] = sum over p of part[p][i], in one fixed order; a block takes kFoldColumns neighbouring columns.
template <class T>
__global__ void __launch_bounds__(kFoldColumns* kFoldRows)
fold_parts(const RealOf<T>* part, int64_t parts, int64_t count, void* out, bool in_storage) {
  using Real = RealOf<T>;
  __shared__ Real sums[kFoldRows][kFoldColumns];
  const unsigned column = threadIdx.x % kFoldColumns, row = threadIdx.x / kFoldColumns;
  const int64_t i = int64_t(blockIdx.x) * kFoldColumns + column;
  Real total = 0;
  if (i < count)
    for (int64_t p = row; p < parts; p += kFoldRows) total += part[p * count + i];
  sums[row][column] = total;
  __syncthreads();
  if (row > 0 || i >= count) return;
  total = 0;
#pragma unroll
  for (int r = 0; r < kFoldRows; ++r) total += sums[r][column];
  if (in_storage) static_cast<T*>(out)[i] = from_real<T>(total);
  else static_cast<Real*>(out)[i] = total;
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
