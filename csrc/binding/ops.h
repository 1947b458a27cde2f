// The ops' signatures, once for all devices: from a schema's argument list (normnorm/ops.py, without the backend's name)
// to what a device's passes take.
#pragma once

#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace normnorm {

template <ForwardResult (*run_forward)(const ForwardTensors&, Config),
          BackwardResult (*run_backward)(const BackwardTensors&, Config), void (*run_fold)(const FoldTensors&)>
class Ops {
 public:
  template <class Library>
  static void implement(Library& library) {
    library.impl("normal_norm_forward", TORCH_BOX(&Ops::normal_norm_forward));
    library.impl("normal_norm_backward", TORCH_BOX(&Ops::normal_norm_backward));
    library.impl("fold_running_", TORCH_BOX(&Ops::fold_running_));
  }

 private:
  static ForwardResult normal_norm_forward(
      const Tensor& input, const OptionalTensor& running_mean, const OptionalTensor& running_var,
      const OptionalTensor& running_lmbda, const OptionalTensor& weight, const OptionalTensor& bias,
      const OptionalTensor& residual, const OptionalTensor& seed, const OptionalTensor& noise_scale, bool prenorm,
      bool keep_stats, const std::string& kind, int64_t num_groups, int64_t normalized_ndim, double eps,
      double noise_train, double alpha, int64_t order, double transform_eps, int64_t stream, bool channels_last,
      const std::string& activation) {
    return run_forward({input, running_mean, running_var, running_lmbda, weight, bias, residual, seed, noise_scale,
                        prenorm, keep_stats},
                       {kind, num_groups, normalized_ndim, eps, noise_train, alpha, order, transform_eps, stream,
                        channels_last, activation});
  }

  static BackwardResult normal_norm_backward(
      const Tensor& grad_output, const Tensor& input, const Tensor& stats, const OptionalTensor& weight,
      const OptionalTensor& bias, const OptionalTensor& output, const OptionalTensor& seed,
      const OptionalTensor& grad_sum, bool needs_input, bool needs_weight, bool needs_bias, bool frozen,
      const std::string& kind, int64_t num_groups, int64_t normalized_ndim, double eps, double noise_train,
      double alpha, int64_t order, double transform_eps, int64_t stream, bool channels_last,
      const std::string& activation) {
    return run_backward({grad_output, input, stats, weight, bias, output, seed, grad_sum, needs_input, needs_weight,
                         needs_bias, frozen},
                        {kind, num_groups, normalized_ndim, eps, noise_train, alpha, order, transform_eps, stream,
                         channels_last, activation});
  }

  static void fold_running_(const Tensor& stats, const Tensor& running_mean, const Tensor& running_var,
                            const Tensor& running_lmbda, const OptionalTensor& num_batches_tracked,
                            std::optional<double> momentum, int64_t count, double eps) {
    run_fold({stats, running_mean, running_var, running_lmbda, num_batches_tracked, momentum, count, eps});
  }
};

}  // namespace normnorm
