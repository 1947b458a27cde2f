#include "cuda_problem.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/plan.h"

namespace normnorm {
namespace {

cuda::Override forced;

// Strides of a dense tensor in row-major or in (N, spatial..., C) order.
std::vector<int64_t> dense_strides(const TensorView& t, bool channels_last) {
  std::vector<int64_t> strides(static_cast<size_t>(t.dim));
  int64_t next = 1;
  if (channels_last) {
    strides[1] = 1;
    next = t.sizes[1];
  }
  for (int64_t i = t.dim - 1; i >= 0; --i) {
    if (channels_last && i == 1) continue;
    strides[size_t(i)] = next;
    next *= t.sizes[i];
  }
  return strides;
}

void check_extent(const Geometry& g) {
  if (g.groups() == 0 || g.group_size() == 0) return;
  const std::string sentence = cuda::refusal(g);
  if (!sentence.empty()) throw std::invalid_argument("the input is too large for the CUDA kernels: " + sentence);
}

}  // namespace

bool noise_order_is_out_of_reach(const TensorView& input, const Config& c) {
  if (c.kind != Kind::kLayer || !c.channels_last || input.dim < 3) return false;
  return input.sizes[1] > 1 && input.product(2, input.dim) > 1;
}

Layout cuda_layout(const TensorView& input, const TensorView& output, const Config& c, bool noise) {
  if (!noise || c.kind == Kind::kLayer) return Layout(input, output, c);
  const std::vector<int64_t> strides = dense_strides(input, c.channels_last);
  TensorView in_noise_order = input;
  in_noise_order.strides = strides.data();
  return Layout(in_noise_order, in_noise_order, c);
}

cuda::Problem cuda_problem(Storage storage, const Layout& layout, const Config& c, bool noise) {
  cuda::Problem p;
  p.storage = storage;
  p.force = forced;
  check_extent(layout.geometry());
  layout.set_params(p, c, noise);
  return p;
}

}  // namespace normnorm

extern "C" void normnorm_cuda_force(int tier, int threads, int blocks, int thread_groups) {
  normnorm::forced = {normnorm::cuda::Tier(tier), threads, blocks, thread_groups};
}
