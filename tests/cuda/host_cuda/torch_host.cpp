// What csrc/binding asks of the CUDA runtime, where the kernels run on the CPU, and what tests may set.
#include "../../../csrc/binding/cuda_device.h"
#include "engine.h"

const char* normnorm::cuda_error_text(int) { return "the host run knows no words for it"; }

// Read through ctypes: the device that the ladder is told of, and the order of a block's threads.
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
