// A pass described by shapes alone, and its problem as csrc/binding/cuda.cpp makes it, in memory that the caller provides.
// For programs without torch.
#pragma once

#include <stdexcept>
#include <vector>

#include "../../csrc/binding/cuda_problem.h"
#include "../../csrc/common/stats.h"

namespace normnorm {

// Mirrored by test_cuda_launches.py.
struct Tensor {
  int64_t strides[5], offset;  // elements, from a boundary of 512 bytes
};
struct Pass {
  int32_t kind;  // Kind
  int64_t num_groups, normalized_ndim, dim, sizes[5];
  Tensor input, grad_output, output, beside;  // beside: the residual or addend, and the gradient of the sum
  int32_t storage, parameters;                // 0: none, 1: in the statistics' type, 2: in the input's
  int32_t backward, channels_last, noise, given_scale, frozen, relu, residual, add;
  int32_t needs_input, needs_weight, needs_bias, parameter_offset;
  int32_t round;  // Round; of one alone, nothing is frozen, given or added before the norm
};

// memory(name, count, storage, offset): the address of so many numbers, `offset` numbers behind a boundary. Returns false
// where the binding would raise an error or launch none of these kernels.
template <class Memory>
bool make_problem(const Pass& pass, Memory memory, cuda::Problem& p) try {
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};
  const Storage storage = Storage(pass.storage);
  const Storage real = storage == Storage::kFloat64 ? storage : Storage::kFloat32;
  const bool backward = pass.backward != 0;
  const Round round = Round(pass.round);
  const bool alone = round != Round::kAll;
  const bool writes = alone ? writes_tensor(round) : !backward || pass.needs_input;
  const auto view = [&](const int64_t* strides) {
    TensorView v;
    v.given = true, v.dim = pass.dim, v.sizes = pass.sizes, v.strides = strides, v.dtype = dtypes[pass.storage];
    return v;
  };
  Arguments a;
  a.input = view(pass.input.strides);
  a.shard = alone;
  Config c;
  c.kind = Kind(pass.kind), c.num_groups = pass.num_groups, c.normalized_ndim = pass.normalized_ndim;
  c.channels_last = pass.channels_last != 0;
  check_forward(a, c);
  const bool draws = alone ? round == Round::kOutput || round == Round::kSums
                           : !backward || (pass.needs_weight && pass.parameters);
  const bool noise = pass.noise && draws;
  if (noise && noise_order_is_out_of_reach(a.input, c)) return false;
  c.noise_train = noise ? 0.4 : 0.0;
  const Layout layout = cuda_layout(a.input, writes ? view(pass.output.strides) : a.input, c, noise);
  p = cuda_problem(storage, layout, c, noise);
  // a tensor, or its dense copy where the layout cannot access it in place
  const auto operand = [&](const char* name, const Tensor& t) {
    const auto in_place = layout.strides(view(t.strides));
    std::vector<int64_t> strides(t.strides, t.strides + pass.dim);
    if (!in_place) layout.natural_strides(a.input, strides.data());
    int64_t last = 0;
    for (int64_t i = 0; i < pass.dim; ++i) last += (pass.sizes[i] - 1) * strides[size_t(i)];
    return Operand{memory(name, last + 1, storage, in_place ? t.offset : 0), *layout.strides(view(strides.data()))};
  };
  int64_t elements = c.kind == Kind::kLayer ? 1 : pass.sizes[1];
  if (c.kind == Kind::kLayer)
    for (int64_t i = pass.dim - pass.normalized_ndim; i < pass.dim; ++i) elements *= pass.sizes[i];
  const auto parameter = [&](const char* name, int64_t offset) {
    const Storage kept = pass.parameters == 2 ? storage : real;
    return cuda::Parameter{memory(name, elements, kept, offset), kept == storage};
  };
  p.input = operand("input", pass.input);
  p.stats = memory("stats", kStatRows * group_count(a.input, c), real, 0);
  if (pass.parameters) {
    p.weight = parameter("weight", pass.parameter_offset);
    p.bias = parameter("bias", pass.parameter_offset);
  }
  if (noise) p.seed = static_cast<const int64_t*>(memory("seed", 1, Storage::kFloat64, 0));
  p.activation = Activation(pass.relu), p.frozen = pass.frozen;
  p.round = round;
  if (const int64_t sums = kRoundSums[pass.round])
    p.sums = static_cast<double*>(memory("round", sums * group_count(a.input, c), Storage::kFloat64, 0));
  if (writes) p.output = operand("output", pass.output);
  if (!backward) {
    if (pass.add) p.sum = operand("sum", pass.output), p.addend = operand("addend", pass.beside);
    else if (pass.residual && writes) p.residual = operand("residual", pass.beside);
    p.noise.given_scale = noise && pass.given_scale;
    return true;
  }
  p.grad_output = operand("grad_output", pass.grad_output);
  if (pass.relu) p.activated = operand("activated", pass.output);
  if (alone) return true;
  if (pass.needs_input && pass.add) p.grad_sum = operand("grad_sum", pass.beside);
  if (pass.parameters && pass.needs_weight) p.grad_weight = parameter("grad_weight", 0);
  if (pass.parameters && pass.needs_bias) p.grad_bias = parameter("grad_bias", 0);
  return p.output.data || p.grad_weight.data || p.grad_bias.data;
} catch (const std::invalid_argument&) {
  return false;
}

}  // namespace normnorm
