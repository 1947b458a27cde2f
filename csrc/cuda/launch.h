// The launchers: what a binding calls. Nothing here synchronises or allocates; all may run under stream capture.
#pragma once

#include "problem.h"
#include "running.h"

extern "C" {

// The bytes of Problem::workspace that a pass over a problem needs; `device` is the number of the current one.
int normnorm_cuda_workspace(const normnorm::cuda::Problem* problem, int backward, size_t* bytes);

// Null, or a sentence that says what of a problem's geometry is too large for the kernels' counters; it lasts until the
// thread's next call. The launchers answer such a problem with cudaErrorInvalidValue.
const char* normnorm_cuda_refusal(const normnorm::cuda::Problem* problem);

// Both return a cudaError_t. The forward pass writes Problem::stats, in inference too.
int normnorm_cuda_forward(const normnorm::cuda::Problem* problem, void* stream);
int normnorm_cuda_backward(const normnorm::cuda::Problem* problem, void* stream);

// The rung that serves a pass: five numbers, Rung, threads, blocks of a team, teams, chunks a thread keeps in shared memory.
int normnorm_cuda_plan(const normnorm::cuda::Problem* problem, int backward, int plan[5]);

// Moves the running statistics towards a batch's, and counts the batch.
int normnorm_cuda_fold_running(const normnorm::cuda::RunningStatistics* running, void* stream);
// Fills the statistics tensor of a frozen layer.
int normnorm_cuda_pack_running(const normnorm::cuda::RunningStatistics* running, void* stream);

}  // extern "C"
