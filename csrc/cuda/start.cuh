// Starting a kernel: on a stream of the device, or in the tests on the CPU.
#pragma once

#include <map>
#include <mutex>
#include <set>
#include <tuple>
#include <utility>

#include "device.cuh"
#include "ladder.h"

namespace normnorm {
namespace cuda {
namespace {

struct Start {
  unsigned grid = 1, threads = 32;
  size_t shared = 0;
  int cluster = 1;
  bool cooperative = false;
  void* stream = nullptr;
};

// What start() returns where the device would not run the blocks of a cooperative launch at once: the pass then streams.
constexpr int kNotAtOnce = cudaErrorCooperativeLaunchTooLarge;

#if defined(__CUDACC__)

// Lets a kernel ask for as much shared memory as a block may have; once a kernel and device, from any thread.
inline cudaError_t allow_shared(const void* kernel) {
  static std::mutex lock;
  static std::set<std::pair<const void*, int>> allowed;
  int id = 0, most = 0;
  cudaError_t e = cudaGetDevice(&id);
  if (e != cudaSuccess) return e;
  const std::lock_guard<std::mutex> guard(lock);
  if (allowed.count({kernel, id})) return cudaSuccess;
  cudaFuncAttributes facts = {};
  e = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (e == cudaSuccess) e = cudaFuncGetAttributes(&facts, kernel);
  if (e == cudaSuccess)
    e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most - int(facts.sharedSizeBytes));
  if (e == cudaSuccess) allowed.insert({kernel, id});
  return e;
}

// A launch as CUDA wants it described.
struct Launch {
  cudaLaunchAttribute attribute[1] = {};
  cudaLaunchConfig_t config = {};
  explicit Launch(const Start& s) {
    config.gridDim = dim3(s.grid);
    config.blockDim = dim3(s.threads);
    config.dynamicSmemBytes = s.shared;
    config.stream = static_cast<cudaStream_t>(s.stream);
    config.attrs = attribute;
    config.numAttrs = s.cooperative || s.cluster > 1 ? 1 : 0;
    if (s.cooperative) {
      attribute[0].id = cudaLaunchAttributeCooperative;
      attribute[0].val.cooperative = 1;
    } else if (s.cluster > 1) {
      attribute[0].id = cudaLaunchAttributeClusterDimension;
      attribute[0].val.clusterDim.x = unsigned(s.cluster);
      attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    }
  }
  Launch(const Launch&) = delete;
};

// An error that is answered here, or returned, and that nobody shall find again who asks for the last one.
inline cudaError_t taken(cudaError_t e) {
  if (e != cudaSuccess) cudaGetLastError();
  return e;
}

// How many blocks of a cluster, or of a cooperative launch, the device would run at the same time.
inline cudaError_t ask_blocks_at_once(const void* entry, const Start& s, const Device& device, int* blocks) {
  cudaError_t e = s.shared > 0 ? allow_shared(entry) : cudaSuccess;
  if (e != cudaSuccess) return e;
  if (s.cooperative) {
    e = cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks, entry, int(s.threads), s.shared);
    *blocks *= device.multiprocessors;
    return e;
  }
  cudaFuncAttributes facts = {};
  e = cudaFuncGetAttributes(&facts, entry);
  if (e != cudaSuccess || facts.ptxVersion < 90) return e;  // code that knows no clusters, on a device that does
  const Launch launch(s);
  e = cudaOccupancyMaxActiveClusters(blocks, entry, &launch.config);
  *blocks *= s.cluster;
  return e;
}

// Whether all of them would: without that their barriers would wait for ever. Only the driver knows: other processes and a
// divided device take their share. It is asked once, and what plans a workspace is told the same as what is started on it.
template <class... P>
bool runs_at_once(void (*kernel)(P...), const Start& s, const Device& device) {
  using Question = std::tuple<const void*, int, unsigned, size_t, int>;
  static std::mutex lock;
  static std::map<Question, int> known;
  if (!device.present) return true;
  const void* entry = reinterpret_cast<const void*>(kernel);
  int id = 0, blocks = 0;
  if (taken(cudaGetDevice(&id)) != cudaSuccess) return false;
  const int wanted = s.cooperative ? int(s.grid) : s.cluster;
  const Question question = {entry, id, s.threads, s.shared, s.cluster};
  const std::lock_guard<std::mutex> guard(lock);
  const auto answer = known.find(question);
  if (answer != known.end()) return answer->second >= wanted;
  if (taken(ask_blocks_at_once(entry, s, device, &blocks)) != cudaSuccess) return false;
  known[question] = blocks;
  return blocks >= wanted;
}

template <class... P, class... A>
int start(void (*kernel)(P...), const Start& s, A... arguments) {
  if (s.shared > 0) {
    const cudaError_t e = taken(allow_shared(reinterpret_cast<const void*>(kernel)));
    if (e != cudaSuccess) return e;
  }
  const Launch launch(s);
  return taken(cudaLaunchKernelEx(&launch.config, kernel, P(arguments)...));
}

inline int zero(void* data, size_t bytes, void* stream) {
  return taken(cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream)));
}

inline cudaError_t ask_device(int id, Device* d) {
  int major = 0, cooperative = 0;
  cudaError_t e = cudaDeviceGetAttribute(&d->multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d->multiprocessor_shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  d->clusters = major >= 9;
  d->cooperative = cooperative != 0;
  d->present = true;
  return e;
}

// Facts of the current device, asked once a device.
inline int device_facts(Device* out) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static cudaError_t answer[kDevices];
  static std::once_flag asked[kDevices];
  int id = 0;
  if (const cudaError_t e = cudaGetDevice(&id)) return e;
  if (id >= kDevices) return ask_device(id, out);
  std::call_once(asked[id], [&] { answer[id] = ask_device(id, &known[id]); });
  *out = known[id];
  return answer[id];
}

#else

template <class... P>
bool runs_at_once(void (*)(P...), const Start& s, const Device&) {
  return int(s.cooperative ? s.grid : s.cluster) <= host_cuda::settings().at_once;
}
template <class... P, class... A>
int start(void (*kernel)(P...), const Start& s, A... arguments) {
  const int company = s.cooperative ? int(s.grid) : s.cluster;
  if (s.shared > host_cuda::kDynamicShared) return cudaErrorInvalidValue;
  if (s.cooperative && host_cuda::settings().refuse_cooperative) return kNotAtOnce;
  host_cuda::run_grid(dim3(s.grid), dim3(s.threads), company, [&] { kernel(arguments...); });
  return cudaSuccess;
}
inline int zero(void* data, size_t bytes, void*) {
  memset(data, 0, bytes);
  return cudaSuccess;
}
inline int device_facts(Device* out) {
  *out = host_cuda::settings().device;
  return cudaSuccess;
}

#endif

}  // namespace
}  // namespace cuda
}  // namespace normnorm
