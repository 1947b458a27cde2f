// The functions that a binding calls. None of them synchronises or allocates; all may run under stream capture.
#pragma once

#include "params.h"

extern "C" {

// The bytes of Problem::workspace that a pass needs on the current device.
int normnorm_cuda_workspace(const normnorm::cuda::Problem* problem, int backward, size_t* bytes);

// All rounds of a pass, or one (Problem::round). Both return a cudaError_t. The geometry must be one that refusal() of
// plan.h lets pass. The forward pass writes Problem::stats, in inference too.
int normnorm_cuda_forward(const normnorm::cuda::Problem* problem, void* stream);
int normnorm_cuda_backward(const normnorm::cuda::Problem* problem, void* stream);

// Moves the running statistics towards a batch's, and counts the batch.
int normnorm_cuda_fold_running(const normnorm::cuda::RunningStatistics* running, void* stream);
// Fills the statistics tensor of a frozen layer.
int normnorm_cuda_pack_running(const normnorm::cuda::RunningStatistics* running, void* stream);

}  // extern "C"
