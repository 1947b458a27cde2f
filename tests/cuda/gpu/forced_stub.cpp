// Launchers that record the problem they are given, to test forced.cpp without a GPU.
#include <initializer_list>

#include "../../../csrc/cuda/launch.h"

using namespace normnorm;
using namespace normnorm::cuda;

extern "C" {
__attribute__((visibility("default"))) double seen[80];
}

namespace {

int write(const Problem* p, int backward) {
  int n = 0;
  const auto put = [&](auto value) { seen[n++] = double(value); };
  const auto address = [&](const void* value) { put(reinterpret_cast<size_t>(value)); };
  const auto strides = [&](const Strides& s) { put(s.outer), put(s.inner), put(s.run); };
  const auto& g = p->geometry;
  put(backward), put(int(p->storage)), put(g.columns), put(g.outer), put(g.inner), put(g.runs), put(g.length);
  put(int(p->affine)), put(p->noise.on), put(p->noise.given_scale), put(p->noise.stream), put(p->noise.train);
  strides(p->noise.position), put(p->order), put(p->frozen), put(p->eps), put(p->alpha), put(p->transform_eps);
  for (auto* q : {&p->weight, &p->bias, &p->grad_weight, &p->grad_bias}) address(q->data), put(q->in_storage_type);
  for (auto* o : {&p->input, &p->output, &p->grad_output, &p->residual, &p->activated, &p->addend, &p->sum, &p->grad_sum})
    address(o->data), strides(o->stride);
  put(p->relu);
  put(int(p->force.tier)), put(p->force.threads), put(p->force.blocks), put(p->force.thread_groups);
  address(p->seed), address(p->stats), address(p->workspace);
  return n;
}

}  // namespace

extern "C" {
int normnorm_cuda_workspace(const Problem* p, int b, size_t* bytes) { *bytes = size_t(write(p, b)); return 0; }
int normnorm_cuda_forward(const Problem* p, void*) { return write(p, 0); }
int normnorm_cuda_backward(const Problem* p, void*) { return write(p, 1); }
int normnorm_cuda_plan(const Problem*, int, int*) { return 1; }
}
