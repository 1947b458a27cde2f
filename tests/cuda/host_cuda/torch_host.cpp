// The CUDA runtime functions of csrc/binding for kernels that run on the CPU, and settings for tests.
#include "../../../csrc/binding/cuda_device.h"
#include "engine.h"

const char* normnorm::cuda_error_text(int) { return "an error of the host run"; }

// Called through ctypes: the device that plans are made for, and the order of a block's threads.
extern "C" __attribute__((visibility("default"))) void host_cuda_device(int multiprocessors, int shared_bytes,
                                                                         int clusters) {
  normnorm::cuda::Device& device = host_cuda::settings().device;
  device.multiprocessors = multiprocessors;
  device.shared_bytes = shared_bytes;
  device.clusters = clusters != 0;
}
extern "C" __attribute__((visibility("default"))) void host_cuda_order(int order) {
  host_cuda::settings().order = order;
}
