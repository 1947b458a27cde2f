// From shapes and numbers to the CUDA kernels' problem without its pointers. No torch here, because `normnorm doctor
// --plan` has no tensors.
#pragma once

#include "../common/checks.h"
#include "../common/layout.h"
#include "../cuda/params.h"

namespace normnorm {

// Whether neither layout of these kernels follows the order of the noise: a layer normalization, which has rows alone,
// with noise in channels_last order over more than one channel and position.
bool noise_order_is_out_of_reach(const TensorView& input, const Config& c);

// The layout that suits `output`, the tensor to be written, and the input; with noise, the one in the noise's order.
Layout cuda_layout(const TensorView& input, const TensorView& output, const Config& c, bool noise);

// Throws std::invalid_argument where the geometry exceeds the kernels' counters.
cuda::Problem cuda_problem(Storage storage, const Layout& layout, const Config& c, bool noise);

}  // namespace normnorm

// For tests: the plan of all later problems, in the numbers of cuda::Override; zeros leave the choice to the planner.
extern "C" __attribute__((visibility("default"))) void normnorm_cuda_force(int tier, int threads, int blocks,
                                                                           int thread_groups);
