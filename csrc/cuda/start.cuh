// Starting a kernel: on a stream of the device, or in the tests on the CPU.
#pragma once

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

#if defined(__CUDACC__)

template <class... P, class... A>
int start(void (*kernel)(P...), const Start& s, A... arguments) {
  if (s.shared > 0) {
    const cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(s.shared));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchAttribute attribute[1] = {};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(s.grid);
  config.blockDim = dim3(s.threads);
  config.dynamicSmemBytes = s.shared;
  config.stream = static_cast<cudaStream_t>(s.stream);
  config.attrs = attribute;
  if (s.cooperative) {
    attribute[0].id = cudaLaunchAttributeCooperative;
    attribute[0].val.cooperative = 1;
    config.numAttrs = 1;
  } else if (s.cluster > 1) {
    attribute[0].id = cudaLaunchAttributeClusterDimension;
    attribute[0].val.clusterDim.x = unsigned(s.cluster);
    attribute[0].val.clusterDim.y = attribute[0].val.clusterDim.z = 1;
    config.numAttrs = 1;
  }
  const cudaError_t e = cudaLaunchKernelEx(&config, kernel, P(arguments)...);
  return e != cudaSuccess ? e : cudaGetLastError();
}

inline int zero(void* data, size_t bytes, void* stream) {
  return cudaMemsetAsync(data, 0, bytes, static_cast<cudaStream_t>(stream));
}

// Facts of the current device, asked once a device.
inline int device_facts(Device* out) {
  constexpr int kDevices = 64;
  static Device known[kDevices];
  static bool asked[kDevices];
  int id = 0;
  cudaError_t e = cudaGetDevice(&id);
  if (e == cudaSuccess && id < kDevices && asked[id]) {
    *out = known[id];
    return cudaSuccess;
  }
  Device d;
  int major = 0;
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&d.shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, id);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, id);
  if (e != cudaSuccess) return e;
  d.clusters = major >= 9;
  if (id < kDevices) {
    known[id] = d;
    asked[id] = true;
  }
  *out = d;
  return cudaSuccess;
}

#else

template <class... P, class... A>
int start(void (*kernel)(P...), const Start& s, A... arguments) {
  const int company = s.cooperative ? int(s.grid) : s.cluster;
  if (s.shared > host_cuda::kDynamicShared) return cudaErrorInvalidValue;
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
