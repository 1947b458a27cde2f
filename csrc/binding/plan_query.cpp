// What the CUDA part of the library says of itself, read through ctypes by normnorm/backends/cuda.py.
#include <cuda_runtime_api.h>

#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/plan.h"
#include "cuda_device.h"
#include "cuda_problem.h"

#define NN_EXPORT extern "C" __attribute__((visibility("default")))

namespace normnorm {

const char* cuda_error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace normnorm

// The architectures that there is machine code for, those with +PTX also for newer ones.
NN_EXPORT const char* normnorm_cuda_architectures() { return NN_CUDA_ARCHITECTURES; }
NN_EXPORT const char* normnorm_cuda_compiler() { return NN_CUDA_COMPILER; }

// The version of the runtime that is linked in and the newest that the driver serves (0: no driver), as CUDA writes
// them: 13000 is 13.0.
NN_EXPORT void normnorm_cuda_versions(int versions[2]) {
  if (cudaRuntimeGetVersion(&versions[0]) != cudaSuccess) versions[0] = 0;
  if (cudaDriverGetVersion(&versions[1]) != cudaSuccess) versions[1] = 0;
}

// The limits of a GPU that plans depend on: multiprocessors, shared memory of a block, whether there are clusters.
NN_EXPORT int normnorm_cuda_device(int index, int facts[3]) {
  int major = 0;
  cudaError_t e = cudaDeviceGetAttribute(&facts[0], cudaDevAttrMultiProcessorCount, index);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&facts[1], cudaDevAttrMaxSharedMemoryPerBlockOptin, index);
  if (e == cudaSuccess) e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
  facts[2] = major >= 9;
  return e;
}

// Which plan would serve a tensor, on a device that need not exist. Mirrored by normnorm/backends/cuda.py.
struct PlanRequest {
  int32_t kind;  // Kind
  int64_t num_groups, normalized_ndim;
  int64_t dim;
  const int64_t *sizes, *strides;
  int32_t storage;  // Storage
  int32_t channels_last, noise, affine, backward;
  int32_t multiprocessors, shared_bytes, clusters;
};

struct PlanAnswer {
  int64_t groups, group_size;
  int64_t items;  // groups, or tiles of columns, that the thread groups process in turn
  int64_t workspace;
  int32_t columns, tier, threads, blocks, thread_groups, shared_chunks;
};

// Null, or a sentence that says what is wrong with the request.
NN_EXPORT const char* normnorm_cuda_plan_shape(const PlanRequest* request, PlanAnswer* answer) {
  using namespace normnorm;
  static thread_local std::string problem;
  try {
    const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
    Arguments a;
    a.input.given = true;
    a.input.dim = request->dim;
    a.input.sizes = request->sizes;
    a.input.strides = request->strides;
    a.input.dtype = dtypes[request->storage];
    Config c;
    c.kind = Kind(request->kind);
    c.num_groups = request->num_groups;
    c.normalized_ndim = request->normalized_ndim;
    c.channels_last = request->channels_last != 0;
    check_forward(a, c);
    const bool noise = request->noise && (!request->backward || request->affine);
    if (noise && noise_order_is_out_of_reach(a.input, c))
      throw std::invalid_argument("no kernel follows the noise's order in this memory format; the reference runs it");
    const Layout layout = cuda_layout(a.input, a.input, c, noise);
    cuda::Problem p = cuda_problem(Storage(request->storage), layout, c, noise);
    // Never read: tensors that begin on a boundary, as torch allocates them. An op copies one that the layout cannot
    // access in place.
    alignas(16) static char somewhere[16];
    std::vector<int64_t> dense(static_cast<size_t>(request->dim));
    TensorView tensor = a.input;
    if (!layout.strides(tensor)) {
      layout.natural_strides(a.input, dense.data());
      tensor.strides = dense.data();
    }
    const Strides strides = *layout.strides(tensor);
    p.input = p.output = p.grad_output = {somewhere, strides};
    if (request->affine) p.weight = p.bias = p.grad_weight = p.grad_bias = {somewhere, true};
    cuda::Device device;
    device.multiprocessors = request->multiprocessors;
    device.shared_bytes = request->shared_bytes;
    device.clusters = request->clusters != 0;
    device.multiprocessor_shared = request->shared_bytes + 1024;  // so on every device there is
    const cuda::Passes& passes = cuda::passes_for(p.storage);
    const bool backward = request->backward != 0;
    const cuda::Plan plan = passes.plan(p, backward, device);
    const size_t workspace = passes.workspace(p, backward, device);
    p.force.tier = cuda::Tier::kStreaming;  // a thread group for each item
    const int64_t items = passes.plan(p, backward, device).thread_groups;
    *answer = {p.geometry.groups(), p.geometry.group_size(), items, int64_t(workspace), p.geometry.columns,
               int(plan.tier), plan.threads, plan.blocks, plan.thread_groups, plan.shared_chunks};
  } catch (const std::exception& e) {
    problem = e.what();
    return problem.c_str();
  }
  return nullptr;
}
