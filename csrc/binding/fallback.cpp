#include "fallback.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <string>

namespace normnorm {
namespace {

using torch::stable::detail::from;
using torch::stable::detail::to;

// Calls an op of namespace normnorm; results come back at the front of the arguments' own array.
template <class... A>
std::array<StableIValue, sizeof...(A)> call(const char* op, const A&... arguments) {
  std::array<StableIValue, sizeof...(A)> stack{from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

const std::string kReference = "reference";
const std::string kKinds[] = {"batch", "layer", "group", "instance"};
const std::string kActivations[] = {"", "relu"};

}  // namespace

ForwardResult fallback_forward(const ForwardTensors& t, const Config& c) {
  const auto results =
      call("normnorm::normal_norm_forward", t.input, t.mean, t.var, t.lmbda, t.weight, t.bias, t.residual, t.seed,
           t.noise_scale, t.prenorm, t.keep_stats, kKinds[int(c.kind)], c.num_groups, c.normalized_ndim, c.eps, c.noise_train,
           c.alpha, c.order, c.transform_eps, c.stream, c.channels_last, kActivations[int(c.activation)], kReference);
  // The public op returns an empty tensor for a result that was not asked for.
  const Tensor stats = to<Tensor>(results[1]), sum = to<Tensor>(results[2]);
  return {to<Tensor>(results[0]), t.keep_stats ? OptionalTensor(stats) : std::nullopt,
          t.prenorm ? OptionalTensor(sum) : std::nullopt};
}

BackwardResult fallback_backward(const BackwardTensors& t, const Config& c) {
  const auto results =
      call("normnorm::normal_norm_backward", t.grad_output, t.input, t.stats, t.weight, t.bias, t.output, t.seed,
           t.grad_sum, t.needs_input, t.needs_weight, t.needs_bias, t.frozen, kKinds[int(c.kind)], c.num_groups,
           c.normalized_ndim, c.eps, c.noise_train, c.alpha, c.order, c.transform_eps, c.stream, c.channels_last,
           kActivations[int(c.activation)], kReference);
  return {to<Tensor>(results[0]), to<Tensor>(results[1]), to<Tensor>(results[2])};
}

}  // namespace normnorm
