// Running statistics: folding a batch's into them, and making a frozen layer's statistics tensor of them. A thread a
// channel, in float64: a handful of numbers, and the same result as on the CPU.
#pragma once

#include "../common/stats.h"
#include "running.h"
#include "storage.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kRunningThreads = 128;

__device__ inline double load_buffer(const Buffer& b, int64_t i) {
  i *= b.stride;
  switch (b.storage) {
    case Storage::kFloat64: return static_cast<const double*>(b.data)[i];
    case Storage::kBFloat16: return to_real(static_cast<const __nv_bfloat16*>(b.data)[i]);
    case Storage::kFloat16: return to_real(static_cast<const __half*>(b.data)[i]);
    default: return static_cast<const float*>(b.data)[i];
  }
}

__device__ inline void store_buffer(const Buffer& b, int64_t i, double v) {
  i *= b.stride;
  switch (b.storage) {
    case Storage::kFloat64: static_cast<double*>(b.data)[i] = v; return;
    case Storage::kBFloat16: static_cast<__nv_bfloat16*>(b.data)[i] = from_real<__nv_bfloat16>(float(v)); return;
    case Storage::kFloat16: static_cast<__half*>(b.data)[i] = from_real<__half>(float(v)); return;
    default: static_cast<float*>(b.data)[i] = float(v);
  }
}

// Every block reads the counter before any may write it: that is left to advance_tracked(), a launch of its own.
template <class Real>
__global__ void __launch_bounds__(kRunningThreads) fold_running(const RunningStatistics r) {
  const int64_t channel = int64_t(blockIdx.x) * kRunningThreads + threadIdx.x;
  if (channel >= r.channels) return;
  const double factor = r.cumulative ? 1.0 / double(*r.tracked + 1) : r.momentum;
  const Real* stats = static_cast<const Real*>(r.stats);
  double mean = 0, var = 0, lmbda = 0;
  for (int64_t group = channel; group < r.groups; group += r.channels) {
    const auto row = [&](StatRow which) { return double(stats[which * r.row_stride + group * r.group_stride]); };
    const double rstd = row(kRstd), biased = 1.0 / (rstd * rstd) - r.eps;
    mean += row(kMean) + row(kMeanLow);
    var += biased < 0 ? 0 : biased;
    lmbda += row(kLmbda);
  }
  const double repeats = double(r.groups / r.channels), unbiased = r.count / (r.count - 1);
  const auto fold = [&](const Buffer& b, double value) {
    const double old = load_buffer(b, channel);
    store_buffer(b, channel, old + factor * (value / repeats - old));
  };
  fold(r.mean, mean);
  fold(r.var, var * unbiased);
  fold(r.lmbda, lmbda);
  if (!r.cumulative && channel == 0 && r.tracked != nullptr) ++*r.tracked;
}

__global__ void advance_tracked(const RunningStatistics r) {
  if (threadIdx.x == 0) ++*r.tracked;
}

// Rows of the statistics tensor from running statistics; those that have no meaning there are zeros.
template <class Real>
__global__ void __launch_bounds__(kRunningThreads) pack_running(const RunningStatistics r) {
  const int64_t channel = int64_t(blockIdx.x) * kRunningThreads + threadIdx.x;
  if (channel >= r.channels) return;
  Real* stats = static_cast<Real*>(r.stats) + channel * r.group_stride;
#pragma unroll
  for (int row = 0; row < kStatRows; ++row) stats[row * r.row_stride] = Real(0);
  stats[kMean * r.row_stride] = Real(load_buffer(r.mean, channel));
  const double var = load_buffer(r.var, channel);
  stats[kRstd * r.row_stride] = Real(1.0 / ::sqrt(var + r.eps)) + in_range(Real(var));
  stats[kLmbda * r.row_stride] = Real(load_buffer(r.lmbda, channel));
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
