// The ops of all compiled backends: each unpacks the arguments of its schema (normnorm/ops.py), checks them, so that an
// error leaves every tensor unchanged, and calls the device's pass.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/stableivalue_conversions.h>

#include <array>
#include <cmath>
#include <stdexcept>

#include "tensors.h"

namespace normnorm {

// The integer argument `flags`, packed by normnorm/config.py: kind, order, channels_last, activation, the op's switches
// and, in 32 bits, the stream.
class Flags {
 public:
  explicit Flags(int64_t bits) : bits_(bits) {}
  Kind kind() const { return Kind(bits_ & 3); }
  int order() const { return bits_ & 4 ? 1 : 2; }
  bool channels_last() const { return bits_ & 8; }
  Activation activation() const { return Activation(bits_ >> 4 & 15); }
  bool given(int number) const { return bits_ >> (8 + number) & 1; }
  int number() const { return bits_ >> 8 & 7; }  // in place of switches
  int64_t stream() const { return bits_ >> 16; }

 private:
  int64_t bits_;
};

// `size`: num_groups for kind group, normalized_ndim for kind layer.
inline Config unpack(double eps, double noise_train, double alpha, double transform_eps, int64_t size, Flags flags) {
  Config c;
  c.kind = flags.kind();
  (c.kind == Kind::kLayer ? c.normalized_ndim : c.num_groups) = size;
  c.settings = {eps, std::sqrt(eps), alpha, transform_eps, flags.order()};
  c.noise_train = noise_train, c.stream = flags.stream(), c.channels_last = flags.channels_last();
  c.activation = flags.activation();
  return c;
}

// Calls a public op. Its results replace the first elements of the array of arguments, which is returned.
template <class... A>
std::array<StableIValue, sizeof...(A)> call_op(const char* op, const A&... arguments) {
  std::array<StableIValue, sizeof...(A)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(op, "", stack.data(), TORCH_ABI_VERSION));
  return stack;
}

// Calls a public op with the reference backend, the definition in Python, on the tensors' device: for calls that the
// device's kernels do not support. `before`: the op's tensors and switches.
template <class... A>
auto call_definition(const char* op, const Config& c, const A&... before) {
  const Settings<double>& s = c.settings;
  return call_op(op, before..., std::string(kKindNames[int(c.kind)]), c.num_groups, c.normalized_ndim, s.eps,
                 c.noise_train, s.alpha, int64_t(s.order), s.transform_eps, c.stream, c.channels_last,
                 std::string(kActivationNames[int(c.activation)]), std::string("reference"));
}

inline ForwardResult forward_by_definition(const ForwardTensors& t, const Config& c) {
  using torch::stable::detail::to;
  const auto results = call_definition("normnorm::normal_norm_forward", c, t.input, t.mean, t.var, t.lmbda, t.weight,
                                       t.bias, t.residual, t.seed, t.noise_scale, t.prenorm, t.keep_stats);
  // The public op returns an empty tensor for a result that was not requested.
  const Tensor stats = to<Tensor>(results[1]), sum = to<Tensor>(results[2]);
  return {to<Tensor>(results[0]), t.keep_stats ? OptionalTensor(stats) : std::nullopt,
          t.prenorm ? OptionalTensor(sum) : std::nullopt};
}

inline BackwardResult backward_by_definition(const BackwardTensors& t, const Config& c) {
  using torch::stable::detail::to;
  const auto results =
      call_definition("normnorm::normal_norm_backward", c, t.grad_output, t.input, t.stats, t.weight, t.bias, t.output,
                      t.seed, t.grad_sum, t.needs_input, t.needs_weight, t.needs_bias, t.frozen);
  return {to<Tensor>(results[0]), to<Tensor>(results[1]), to<Tensor>(results[2])};
}

template <ForwardResult (*run_forward)(const ForwardTensors&, const Arguments&, const Config&),
          BackwardResult (*run_backward)(const BackwardTensors&, const Arguments&, const Config&),
          void (*run_fold)(const FoldTensors&)>
class Ops {
 public:
  template <class Library>
  static void implement(Library& library) {
    library.impl("forward", TORCH_BOX(&Ops::forward));
    library.impl("backward", TORCH_BOX(&Ops::backward));
    library.impl("fold_running_", TORCH_BOX(&Ops::fold_running_));
  }

 private:
  using Result = std::tuple<Tensor, OptionalTensor, OptionalTensor, OptionalTensor>;

  // (output, statistics, sum, seed). With the switch `step` the op draws a missing seed and moves the running
  // statistics towards the input's; without it, the running statistics replace the input's.
  static Result forward(const Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
                        const OptionalTensor& running_lmbda, const OptionalTensor& num_batches_tracked,
                        const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
                        const OptionalTensor& given_seed, const OptionalTensor& noise_scale,
                        std::optional<double> momentum, double eps, double noise_train, double alpha,
                        double transform_eps, int64_t size, int64_t bits) {
    const Flags flags(bits);
    const Config config = unpack(eps, noise_train, alpha, transform_eps, size, flags);
    const bool prenorm = flags.given(0), keep_stats = flags.given(1), step = flags.given(2);
    const OptionalTensor none;
    OptionalTensor seed = given_seed;
    const ForwardTensors tensors{input, step ? none : running_mean, step ? none : running_var,
                                 step ? none : running_lmbda, weight, bias, residual, seed, noise_scale,
                                 prenorm, keep_stats || step};
    Arguments a = tensors.arguments();
    a.draws = step;
    check_forward(a, config);
    const int64_t count = group_size(a.input, config);
    const bool moves = step && running_mean;
    if (moves) {
      TensorView stats = a.input;
      const int64_t shape[] = {kStatRows, group_count(a.input, config)};
      stats.dim = 2, stats.sizes = shape, stats.dtype = statistics_dtype(a.input.dtype);
      check_fold(fold_arguments(stats, *running_mean, *running_var, *running_lmbda, num_batches_tracked, momentum,
                                count, eps));
    }
    if (config.noise_train > 0 && !seed) seed = draw_seed(a.input);
    auto [output, stats, sum] = run_forward(tensors, a, config);
    if (moves)
      run_fold({*stats, *running_mean, *running_var, *running_lmbda, num_batches_tracked, momentum, count, eps});
    return {output, keep_stats ? stats : none, sum, seed};
  }

  static BackwardResult backward(const Tensor& grad_output, const Tensor& input, const Tensor& stats,
                                 const OptionalTensor& weight, const OptionalTensor& bias,
                                 const OptionalTensor& output, const OptionalTensor& seed,
                                 const OptionalTensor& grad_sum, double eps, double noise_train, double alpha,
                                 double transform_eps, int64_t size, int64_t bits) {
    const Flags flags(bits);
    const Config config = unpack(eps, noise_train, alpha, transform_eps, size, flags);
    const BackwardTensors tensors{grad_output, input, stats, weight, bias, output, seed, grad_sum,
                                  flags.given(0), flags.given(1), flags.given(2), flags.given(3)};
    const Arguments a = tensors.arguments();
    check_backward(a, config);
    return run_backward(tensors, a, config);
  }

  static void fold_running_(const Tensor& stats, const Tensor& running_mean, const Tensor& running_var,
                            const Tensor& running_lmbda, const OptionalTensor& num_batches_tracked,
                            std::optional<double> momentum, int64_t count, double eps) {
    check_fold(fold_arguments(view(stats), running_mean, running_var, running_lmbda, num_batches_tracked, momentum,
                              count, eps));
    run_fold({stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps});
  }
};

// `result`: the output or the gradient of the input, in which a device's kernels may keep a cache from round to round;
// `grad_output` and `output` belong to the backward rounds.
struct RoundTensors {
  const Tensor &input, &stats;
  const OptionalTensor &sums, &result, &weight, &bias, &residual, &seed, &grad_output, &output;
};

// One round of the batch pass over a shard; the flags have its number. Between the rounds the caller adds the sums of
// all shards and fills in the statistics.
template <void (*run_round)(const RoundTensors&, const Arguments&, const Config&, Round)>
void round_(const Tensor& input, const Tensor& stats, const OptionalTensor& sums, const OptionalTensor& result,
            const OptionalTensor& weight, const OptionalTensor& bias, const OptionalTensor& residual,
            const OptionalTensor& seed, const OptionalTensor& grad_output, const OptionalTensor& output, double eps,
            double noise_train, double alpha, double transform_eps, int64_t size, int64_t bits) {
  const Flags flags(bits);
  const Config config = unpack(eps, noise_train, alpha, transform_eps, size, flags);
  const Round round = Round(flags.number());
  Arguments a;
  a.input = view(input), a.stats = view(stats), a.sums = view(sums), a.result = view(result);
  a.weight = view(weight), a.bias = view(bias), a.residual = view(residual), a.seed = view(seed);
  a.grad_output = view(grad_output), a.output = view(output);
  a.shard = true;
  check_round(a, config, kRoundSums[int(round)]);
  const bool writes = writes_tensor(round);
  if (round == Round::kAll || is_backward(round) != a.grad_output.given || (writes && !result) ||
      !stats.is_contiguous() || (sums && !sums->is_contiguous()))
    throw std::invalid_argument("the arguments do not fit the round");
  if (a.input.numel() == 0) {
    Tensor written = sums && !writes ? *sums : nothing(a.input);
    torch::stable::zero_(written);
    return;
  }
  run_round({input, stats, sums, result, weight, bias, residual, seed, grad_output, output}, a, config, round);
}

}  // namespace normnorm
