// The launchers of launch.h, and the kernels of the running statistics.
#include "launch.h"

#include "../common/stats.h"
#include "io.cuh"

namespace normnorm {
namespace cuda {
namespace {

// The kernels of the running statistics: a thread a channel, in float64, with the CPU kernels' results.
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

// Moves a channel's running statistics towards the mean over its groups. With a cumulative average every block reads the
// counter, so that advance_tracked() increments it in a later launch.
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

// Rows of the statistics tensor from running statistics; the rows that these do not define are zeros.
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

int launch_by_channel(void (*kernel)(const RunningStatistics), const RunningStatistics& r, void* stream) {
  const unsigned blocks = unsigned(ceil_div(r.channels, kRunningThreads));
  return launch(kernel, {.grid = blocks, .threads = kRunningThreads, .stream = stream}, r);
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm

using namespace normnorm::cuda;

extern "C" int normnorm_cuda_workspace(const Problem* problem, int backward, size_t* bytes) {
  Device device;
  if (const int e = current_device(&device)) return e;
  *bytes = passes_for(problem->storage).workspace(*problem, backward != 0, device);
  return cudaSuccess;
}

extern "C" int normnorm_cuda_forward(const Problem* problem, void* stream) {
  Device device;
  if (const int e = current_device(&device)) return e;
  return passes_for(problem->storage).forward(*problem, device, stream);
}

extern "C" int normnorm_cuda_backward(const Problem* problem, void* stream) {
  Device device;
  if (const int e = current_device(&device)) return e;
  return passes_for(problem->storage).backward(*problem, device, stream);
}

extern "C" int normnorm_cuda_fold_running(const RunningStatistics* running, void* stream) {
  const RunningStatistics& r = *running;
  if (const int e = launch_by_channel(r.double_stats ? fold_running<double> : fold_running<float>, r, stream)) return e;
  if (!r.cumulative) return cudaSuccess;
  return launch(advance_tracked, {.stream = stream}, r);
}

extern "C" int normnorm_cuda_pack_running(const RunningStatistics* running, void* stream) {
  return launch_by_channel(running->double_stats ? pack_running<double> : pack_running<float>, *running, stream);
}
