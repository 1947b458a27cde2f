// The ops of namespace normnorm_cuda.
//
// The library loads into a torch without CUDA too: the one symbol that only a torch with CUDA has is weak. Nothing
// here waits for the device; all memory is torch's; everything goes to the current stream, so that it can be captured.
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "../common/stats.h"
#include "../cuda/launch.h"
#include "cuda_device.h"
#include "cuda_problem.h"
#include "ops.h"

extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream)
    __attribute__((weak));

// The tests run the kernels on the CPU and register this file's ops for the CPU.
#ifndef NN_CUDA_DISPATCH_KEY
#define NN_CUDA_DISPATCH_KEY CUDA
#endif

namespace normnorm {
namespace {

// Makes a tensor's device the current one and finds its stream. Tensors of the host run have neither.
class OnDevice {
 public:
  explicit OnDevice(const TensorView& t) {
    if (t.device_type == aoti_torch_device_type_cpu()) return;
    if (!aoti_torch_get_current_cuda_stream)
      throw std::runtime_error("the CUDA kernels were loaded into a torch without CUDA");
    guard_.emplace(t.device_index);
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.device_index, &stream));
  }
  void* stream = nullptr;

 private:
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

void require_success(int error, const char* what) {
  if (error == 0) return;
  throw std::runtime_error(std::string(what) + " could not be started: CUDA error " + std::to_string(error) + ", " +
                           cuda_error_text(error));
}

Tensor dense(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

// A dense parameter as the kernels read it; keeps its copy where it had to be made dense.
class Parameter {
 public:
  Parameter(const OptionalTensor& t, Dtype storage) {
    if (!t) return;
    tensor_ = dense(*t);
    operand = {tensor_->data_ptr(), dtype_of(*tensor_) == storage};
  }
  cuda::Parameter operand;

 private:
  OptionalTensor tensor_;
};

// The gradient of a parameter, which the kernels write in the parameter's own dtype.
struct ParameterGradient {
  ParameterGradient(bool wanted, const TensorView& parameter, const TensorView& input)
      : tensor(wanted ? empty_contiguous(parameter.sizes, parameter.dim, parameter.dtype, parameter) : nothing(input)),
        wanted(wanted) {
    if (wanted) operand = {tensor.data_ptr(), parameter.dtype == input.dtype};
  }
  void zero() {
    if (wanted) torch::stable::zero_(tensor);
  }
  Tensor tensor;
  bool wanted;
  cuda::Parameter operand;
};

// Runs a pass on a workspace that goes back to torch, to be used again by whatever this stream does next.
void run(cuda::Problem& p, bool backward, const TensorView& input, void* stream) {
  const char* what = backward ? "the backward pass" : "the forward pass";
  size_t bytes = 0;
  require_success(normnorm_cuda_workspace(&p, backward, &bytes), what);
  OptionalTensor workspace;
  if (bytes > 0) {
    const int64_t words = int64_t(bytes + 7) / 8;
    workspace = empty_contiguous(&words, 1, Dtype::kFloat64, input);
    p.workspace = workspace->data_ptr();
  }
  require_success(backward ? normnorm_cuda_backward(&p, stream) : normnorm_cuda_forward(&p, stream), what);
}

cuda::Buffer buffer(const Tensor& t) { return {t.data_ptr(), storage_of(dtype_of(t)), t.stride(0)}; }

// Fills a statistics tensor with what a frozen layer knows, and with a given noise scale.
void prepare_stats(Tensor& stats, const ForwardTensors& t, double eps, bool given_scale, void* stream) {
  if (t.mean) {
    cuda::RunningStatistics r;
    r.mean = buffer(*t.mean), r.var = buffer(*t.var), r.lmbda = buffer(*t.lmbda);
    r.channels = r.row_stride = stats.size(1);
    r.eps = eps;
    r.double_stats = dtype_of(stats) == Dtype::kFloat64;
    r.stats = stats.data_ptr();
    require_success(normnorm_cuda_pack_running(&r, stream), "reading the running statistics");
  }
  if (given_scale) {
    Tensor row = torch::stable::select(stats, 0, kNoiseScale);
    torch::stable::copy_(row, *t.noise_scale);
  }
}

ForwardResult run_forward(const ForwardTensors& t, const Arguments& a, const Config& config) {
  const bool noise = config.noise_train > 0;
  if (noise && noise_order_is_out_of_reach(a.input, config)) return forward_by_definition(t, config);

  const OnDevice device(a.input);
  Tensor output = empty_like(t.input, a.input);
  const int64_t shape[] = {kStatRows, group_count(a.input, config)};
  Tensor stats = empty_contiguous(shape, 2, statistics_dtype(a.input.dtype), a.input);
  OptionalTensor sum;
  if (t.prenorm) sum = empty_like(t.input, a.input);
  const auto result = [&]() -> ForwardResult {
    return {output, t.keep_stats ? OptionalTensor(stats) : std::nullopt, sum};
  };
  if (a.input.numel() == 0) {
    torch::stable::zero_(stats);
    return result();
  }
  const Layout layout = cuda_layout(a.input, view(output), config, noise);
  cuda::Problem p = cuda_problem(storage_of(a.input.dtype), layout, config, noise);
  const Parameter weight(t.weight, a.input.dtype), bias(t.bias, a.input.dtype);
  const Source source(t.input, layout);
  Target target(output, layout);
  const OptionalSource residual(t.residual, layout);
  std::optional<Target> sum_target;
  if (sum) p.sum = sum_target.emplace(*sum, layout).operand;
  (t.prenorm ? p.addend : p.residual) = residual.operand;
  p.weight = weight.operand;
  p.bias = bias.operand;
  p.input = source.operand;
  p.output = target.operand;
  p.stats = stats.data_ptr();
  p.frozen = t.mean.has_value();
  if (noise) p.seed = static_cast<const int64_t*>(t.seed->data_ptr());
  p.noise.given_scale = noise && t.noise_scale;
  prepare_stats(stats, t, config.settings.eps, p.noise.given_scale, device.stream);
  run(p, false, a.input, device.stream);
  target.finish();
  if (sum_target) sum_target->finish();
  return result();
}

BackwardResult run_backward(const BackwardTensors& t, const Arguments& a, const Config& config) {
  // The gradients of the input and of the bias do not know the noise.
  const bool noise = config.noise_train > 0 && t.needs_weight;
  if (noise && noise_order_is_out_of_reach(a.input, config)) return backward_by_definition(t, config);

  const OnDevice device(a.input);
  Tensor grad_input = t.needs_input ? empty_like(t.input, a.input) : nothing(a.input);
  ParameterGradient grad_weight(t.needs_weight, a.weight, a.input), grad_bias(t.needs_bias, a.bias, a.input);
  if (a.input.numel() == 0 || !(t.needs_input || t.needs_weight || t.needs_bias)) {
    grad_weight.zero();
    grad_bias.zero();
    return {grad_input, grad_weight.tensor, grad_bias.tensor};
  }
  const Layout layout = cuda_layout(a.input, t.needs_input ? view(grad_input) : a.input, config, noise);
  cuda::Problem p = cuda_problem(storage_of(a.input.dtype), layout, config, noise);
  const Parameter weight(t.weight, a.input.dtype), bias(t.bias, a.input.dtype);
  const Source input(t.input, layout), grad_output(t.grad_output, layout);
  const OptionalSource activated(t.output, layout), grad_sum(t.grad_sum, layout);
  const Tensor stats = dense(t.stats);
  std::optional<Target> target;
  if (t.needs_input) target.emplace(grad_input, layout);
  p.weight = weight.operand;
  p.bias = bias.operand;
  p.input = input.operand;
  p.grad_output = grad_output.operand;
  p.activated = activated.operand;
  p.grad_sum = grad_sum.operand;
  if (target) p.output = target->operand;
  p.stats = stats.data_ptr();
  p.frozen = t.frozen;
  if (noise) p.seed = static_cast<const int64_t*>(t.seed->data_ptr());
  p.grad_weight = grad_weight.operand;
  p.grad_bias = grad_bias.operand;
  run(p, true, a.input, device.stream);
  if (target) target->finish();
  return {grad_input, grad_weight.tensor, grad_bias.tensor};
}

void run_round(const RoundTensors& t, const Arguments& a, const Config& config, Round round) {
  const bool noise = config.noise_train > 0 && (round == Round::kOutput || round == Round::kSums);
  const bool writes = writes_tensor(round);
  const OnDevice device(a.input);
  const Layout layout = cuda_layout(a.input, writes ? a.result : a.input, config, noise);
  cuda::Problem p = cuda_problem(storage_of(a.input.dtype), layout, config, noise);
  const Parameter weight(t.weight, a.input.dtype), bias(t.bias, a.input.dtype);
  const Source input(t.input, layout);
  const OptionalTensor none;
  const OptionalSource residual(round == Round::kOutput ? t.residual : none, layout);
  const OptionalSource grad_output(t.grad_output, layout), activated(t.output, layout);
  std::optional<Target> target;
  if (writes) p.output = target.emplace(*t.result, layout).operand;
  p.round = round;
  p.sums = t.sums ? static_cast<double*>(t.sums->data_ptr()) : nullptr;
  p.weight = weight.operand;
  p.bias = bias.operand;
  p.input = input.operand;
  p.residual = residual.operand;
  p.grad_output = grad_output.operand;
  p.activated = activated.operand;
  p.stats = t.stats.data_ptr();
  if (noise) p.seed = static_cast<const int64_t*>(t.seed->data_ptr());
  run(p, is_backward(round), a.input, device.stream);
  if (target) target->finish();
}

void run_fold(const FoldTensors& t) {
  const TensorView stats = view(t.stats);
  const OnDevice device(stats);
  cuda::RunningStatistics r;
  r.mean = buffer(t.mean), r.var = buffer(t.var), r.lmbda = buffer(t.lmbda);
  r.channels = t.mean.size(0);
  r.eps = t.eps;
  r.double_stats = stats.dtype == Dtype::kFloat64;
  r.stats = t.stats.data_ptr();
  r.row_stride = t.stats.stride(0), r.group_stride = t.stats.stride(1);
  r.groups = t.stats.size(1);
  r.tracked = t.tracked ? static_cast<int64_t*>(t.tracked->data_ptr()) : nullptr;
  r.cumulative = !t.momentum;
  r.momentum = t.momentum.value_or(0.0);
  r.count = double(t.count);
  for (const Tensor* written : {&t.mean, &t.var, &t.lmbda}) note_write(*written);
  if (t.tracked) note_write(*t.tracked);
  require_success(normnorm_cuda_fold_running(&r, device.stream), "the update of the running statistics");
}

}  // namespace
}  // namespace normnorm

STABLE_TORCH_LIBRARY_IMPL(normnorm_cuda, NN_CUDA_DISPATCH_KEY, m) {
  normnorm::Ops<normnorm::run_forward, normnorm::run_backward, normnorm::run_fold>::implement(m);
  m.impl("round_", TORCH_BOX(&normnorm::round_<normnorm::run_round>));
}
