// The launchers of launch.h: they choose the storage type's kernels.
#include "launch.h"

#include "kernels.h"
#include "limits.h"
#include "running.cuh"
#include "start.cuh"

namespace normnorm {
namespace cuda {
namespace {

const Passes& passes_for(Storage storage) {
  switch (storage) {
    case Storage::kFloat64: return float64_passes();
    case Storage::kBFloat16: return bfloat16_passes();
    case Storage::kFloat16: return float16_passes();
    default: return float32_passes();
  }
}

// The device, where the problem is one that the kernels can count.
int facts_for(const Problem& p, Device* device) {
  return refusal(p.geometry).empty() ? device_facts(device) : int(cudaErrorInvalidValue);
}

int start_by_channel(void (*kernel)(const RunningStatistics), const RunningStatistics& r, void* stream) {
  Start s;
  s.threads = kRunningThreads;
  s.grid = unsigned(ceil_div(r.channels, kRunningThreads));
  s.stream = stream;
  return start(kernel, s, r);
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm

using namespace normnorm::cuda;

extern "C" const char* normnorm_cuda_refusal(const Problem* problem) {
  static thread_local std::string sentence;
  sentence = refusal(problem->geometry);
  return sentence.empty() ? nullptr : sentence.c_str();
}

extern "C" int normnorm_cuda_workspace(const Problem* problem, int backward, size_t* bytes) {
  Device device;
  if (const int e = facts_for(*problem, &device)) return e;
  *bytes = passes_for(problem->storage).workspace(*problem, backward != 0, device);
  return cudaSuccess;
}

extern "C" int normnorm_cuda_forward(const Problem* problem, void* stream) {
  Device device;
  if (const int e = facts_for(*problem, &device)) return e;
  return passes_for(problem->storage).forward(*problem, device, stream);
}

extern "C" int normnorm_cuda_backward(const Problem* problem, void* stream) {
  Device device;
  if (const int e = facts_for(*problem, &device)) return e;
  return passes_for(problem->storage).backward(*problem, device, stream);
}

extern "C" int normnorm_cuda_plan(const Problem* problem, int backward, int plan[5]) {
  Device device;
  if (const int e = facts_for(*problem, &device)) return e;
  const Plan p = passes_for(problem->storage).plan(*problem, backward != 0, device);
  const int numbers[5] = {int(p.rung), p.threads, p.blocks, p.teams, p.shared_chunks};
  for (int i = 0; i < 5; ++i) plan[i] = numbers[i];
  return cudaSuccess;
}

extern "C" int normnorm_cuda_fold_running(const RunningStatistics* running, void* stream) {
  const RunningStatistics& r = *running;
  if (const int e = start_by_channel(r.double_stats ? fold_running<double> : fold_running<float>, r, stream)) return e;
  if (!r.cumulative) return cudaSuccess;
  Start s;
  s.stream = stream;
  return start(advance_tracked, s, r);
}

extern "C" int normnorm_cuda_pack_running(const RunningStatistics* running, void* stream) {
  return start_by_channel(running->double_stats ? pack_running<double> : pack_running<float>, *running, stream);
}
