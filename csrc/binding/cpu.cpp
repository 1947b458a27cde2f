// The ops of namespace normnorm_cpu.
//
// normnorm/ops.py defines the schemas. Each op makes views of its tensors, checks them, selects a layout and calls the
// kernels. A tensor whose strides do not fit the layout is replaced by a dense copy.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cmath>
#include <string>
#include <vector>

#include "../common/stats.h"
#include "../math/philox.h"
#include "ops.h"
#include "threads.h"

namespace normnorm {
namespace {

// f(T*) with the C++ type of the dtype.
template <class F>
void with_type(Dtype dtype, void* data, F f) {
  switch (dtype) {
    case Dtype::kFloat64:
      return f(static_cast<double*>(data));
    case Dtype::kFloat32:
      return f(static_cast<float*>(data));
    case Dtype::kBFloat16:
      return f(static_cast<torch::headeronly::BFloat16*>(data));
    default:
      return f(static_cast<torch::headeronly::Half*>(data));
  }
}

// A vector of numbers as doubles, whatever its dtype and stride.
std::vector<double> values(const Tensor& t) {
  const TensorView v = view(t);
  std::vector<double> out(static_cast<size_t>(v.numel()));
  with_type(v.dtype, t.data_ptr(), [&](auto* data) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = double(data[int64_t(i) * v.strides[0]]);
  });
  return out;
}

template <class To>
void convert(const Tensor& from, To* to) {
  const int64_t count = from.numel();
  with_type(dtype_of(from), from.data_ptr(), [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<To>(data[i]);
  });
}

// A dense parameter in the compute dtype: the tensor's own memory where it is that already.
class Parameter {
 public:
  Parameter(const OptionalTensor& t, Dtype compute) {
    if (!t) return;
    if (dtype_of(*t) == compute && t->is_contiguous()) {
      data_ = t->data_ptr();
      return;
    }
    const Tensor dense = t->is_contiguous() ? *t : torch::stable::contiguous(*t);
    const TensorView v = view(dense);
    copy_.emplace(empty_contiguous(v.sizes, v.dim, compute, v));
    fill(dense, compute);
  }
  // `value` in every element, for a parameter that is absent beside one that is not
  void set_constant(const TensorView& like, Dtype compute, double value) {
    copy_.emplace(empty_contiguous(like.sizes, like.dim, compute, like));
    data_ = copy_->data_ptr();
    with_type(compute, data_, [&](auto* data) {
      for (int64_t i = 0; i < like.numel(); ++i)
        data[i] = static_cast<std::remove_reference_t<decltype(*data)>>(value);
    });
  }
  const void* data() const { return data_; }

 private:
  void fill(const Tensor& from, Dtype compute) {
    data_ = copy_->data_ptr();
    if (compute == Dtype::kFloat64)
      convert(from, static_cast<double*>(data_));
    else
      convert(from, static_cast<float*>(data_));
  }
  OptionalTensor copy_;
  void* data_ = nullptr;
};

// The gradient of a parameter: computed in the compute dtype, handed out in the parameter's own.
class ParameterGradient {
 public:
  ParameterGradient(bool wanted, const TensorView& parameter, Dtype compute, const TensorView& input)
      : result_(wanted ? empty_contiguous(parameter.sizes, parameter.dim, parameter.dtype, parameter)
                       : nothing(input)) {
    if (!wanted) return;
    computed_ = result_;
    if (parameter.dtype != compute)
      computed_ = empty_contiguous(parameter.sizes, parameter.dim, compute, parameter);
  }
  void* data() { return computed_ ? computed_->data_ptr() : nullptr; }
  Tensor finish() {
    if (computed_ && computed_->get() != result_.get())
      with_type(dtype_of(result_), result_.data_ptr(), [&](auto* data) { convert(*computed_, data); });
    return result_;
  }
  void zero() {
    if (computed_) torch::stable::zero_(*computed_);
  }

 private:
  Tensor result_;
  OptionalTensor computed_;
};

cpu::Problem make_problem(const TensorView& input, const Layout& layout, const Config& c,
                          const OptionalTensor& seed, bool noise) {
  cpu::Problem p;
  p.storage = storage_of(input.dtype);
  p.pool = torch_threads();
  layout.set_params(p, c, noise && c.noise_train > 0);
  if (p.noise.on) p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  return p;
}

// Weight and bias for a problem; where they vary by element, one alone gets a partner of ones or zeros.
struct Parameters {
  Parameter weight, bias;
  Parameters(const OptionalTensor& w, const OptionalTensor& b, Dtype compute, cpu::Problem& p)
      : weight(w, compute), bias(b, compute) {
    if (p.affine == Affine::kPerElement) {
      if (w && !b) bias.set_constant(view(*w), compute, 0.0);
      if (b && !w) weight.set_constant(view(*b), compute, 1.0);
    }
    p.weight = weight.data();
    p.bias = bias.data();
  }
};

// Writes running statistics, or zeros, and a given noise scale into a statistics tensor.
void prepare_stats(const Tensor& stats, const OptionalTensor& mean, const OptionalTensor& var,
                   const OptionalTensor& lmbda, const OptionalTensor& noise_scale, double eps) {
  const int64_t groups = stats.size(1);
  with_type(dtype_of(stats), stats.data_ptr(), [&](auto* data) {
    using T = std::remove_reference_t<decltype(*data)>;
    if (mean) {
      const auto m = values(*mean), v = values(*var), l = values(*lmbda);
      for (int64_t i = 0; i < kStatRows * groups; ++i) data[i] = static_cast<T>(0.0);
      for (int64_t i = 0; i < groups; ++i) {
        data[kMean * groups + i] = static_cast<T>(m[size_t(i)]);
        data[kRstd * groups + i] =
            static_cast<T>(1.0 / std::sqrt(v[size_t(i)] + eps)) + in_range(static_cast<T>(v[size_t(i)]));
        data[kLmbda * groups + i] = static_cast<T>(l[size_t(i)]);
      }
    }
    if (noise_scale) {
      const auto s = values(*noise_scale);
      for (int64_t i = 0; i < groups; ++i) data[kNoiseScale * groups + i] = static_cast<T>(s[size_t(i)]);
    }
  });
}

ForwardResult run_forward(const ForwardTensors& t, const Arguments& a, const Config& config) {
  Tensor output = empty_like(t.input, a.input);
  const Dtype compute = statistics_dtype(a.input.dtype);
  const int64_t shape[] = {kStatRows, group_count(a.input, config)};
  Tensor stats = empty_contiguous(shape, 2, compute, a.input);
  OptionalTensor sum;
  if (t.prenorm) sum = empty_like(t.input, a.input);
  const auto result = [&]() -> ForwardResult {
    return {output, t.keep_stats ? OptionalTensor(stats) : std::nullopt, sum};
  };
  if (a.input.numel() == 0) {
    torch::stable::zero_(stats);
    return result();
  }
  const Layout layout(a.input, view(output), config);
  cpu::Problem p = make_problem(a.input, layout, config, t.seed, true);
  const Parameters parameters(t.weight, t.bias, compute, p);
  const Source source(t.input, layout);
  Target target(output, layout);
  const OptionalSource residual(t.residual, layout);
  std::optional<Target> sum_target;
  if (sum) p.sum = sum_target.emplace(*sum, layout).operand;
  (t.prenorm ? p.addend : p.residual) = residual.operand;
  p.input = source.operand;
  p.output = target.operand;
  p.stats = stats.data_ptr();
  p.frozen = t.mean.has_value();
  p.noise.given_scale = p.noise.on && t.noise_scale;
  prepare_stats(stats, t.mean, t.var, t.lmbda, p.noise.given_scale ? t.noise_scale : OptionalTensor(),
                config.settings.eps);
  cpu::kernels().forward(p);
  target.finish();
  if (sum_target) sum_target->finish();
  return result();
}

BackwardResult run_backward(const BackwardTensors& t, const Arguments& a, const Config& config) {
  const Dtype compute = statistics_dtype(a.input.dtype);
  Tensor grad_input = t.needs_input ? empty_like(t.input, a.input) : nothing(a.input);
  ParameterGradient grad_weight(t.needs_weight, a.weight, compute, a.input);
  ParameterGradient grad_bias(t.needs_bias, a.bias, compute, a.input);
  if (a.input.numel() == 0 || !(t.needs_input || t.needs_weight || t.needs_bias)) {
    grad_weight.zero();
    grad_bias.zero();
    return {grad_input, grad_weight.finish(), grad_bias.finish()};
  }
  const Layout layout(a.input, t.needs_input ? view(grad_input) : a.input, config);
  cpu::Problem p = make_problem(a.input, layout, config, t.seed, t.needs_weight);
  const Parameters parameters(t.weight, t.bias, compute, p);
  const Source input(t.input, layout), grad_output(t.grad_output, layout);
  const OptionalSource activated(t.output, layout), grad_sum(t.grad_sum, layout);
  const Tensor stats = t.stats.is_contiguous() ? t.stats : torch::stable::contiguous(t.stats);
  std::optional<Target> target;
  if (t.needs_input) target.emplace(grad_input, layout);
  p.input = input.operand;
  p.grad_output = grad_output.operand;
  p.activated = activated.operand;
  p.grad_sum = grad_sum.operand;
  if (target) p.output = target->operand;
  p.stats = stats.data_ptr();
  p.frozen = t.frozen;
  p.grad_weight = grad_weight.data();
  p.grad_bias = grad_bias.data();
  cpu::kernels().backward(p);
  if (target) target->finish();
  return {grad_input, grad_weight.finish(), grad_bias.finish()};
}

void run_round(const RoundTensors& t, const Arguments& a, const Config& config, Round round) {
  const Layout layout(a.input, t.result ? a.result : a.input, config);
  cpu::Problem p = make_problem(a.input, layout, config, t.seed, true);
  const Parameters parameters(t.weight, t.bias, statistics_dtype(a.input.dtype), p);
  const Source input(t.input, layout);
  const OptionalSource residual(t.residual, layout), grad_output(t.grad_output, layout), activated(t.output, layout);
  std::optional<Target> target;
  if (t.result) p.output = target.emplace(*t.result, layout, true).operand;
  p.round = round;
  p.sums = t.sums ? static_cast<double*>(t.sums->data_ptr()) : nullptr;
  p.input = input.operand;
  p.residual = residual.operand;
  p.grad_output = grad_output.operand;
  p.activated = activated.operand;
  p.stats = t.stats.data_ptr();
  (is_backward(round) ? cpu::kernels().backward : cpu::kernels().forward)(p);
  if (target) target->finish();
}

void run_fold(const FoldTensors& t) {
  const int64_t channels = t.mean.size(0), repeats = t.stats.size(1) / channels;
  const int64_t row = t.stats.stride(0), column = t.stats.stride(1);
  double factor = t.momentum.value_or(0.0);
  if (t.tracked) {
    const int64_t tracked = *static_cast<const int64_t*>(t.tracked->data_ptr()) + 1;
    note_write(*t.tracked);
    *static_cast<int64_t*>(t.tracked->data_ptr()) = tracked;
    if (!t.momentum) factor = 1.0 / double(tracked);
  }
  const double unbiased = double(t.count) / double(t.count - 1);
  // batch_value(get) averaged over the repeats of a channel, folded into the buffer
  const auto fold = [&](const Tensor& running, auto batch_value) {
    std::vector<double> folded = values(running);
    with_type(dtype_of(t.stats), t.stats.data_ptr(), [&](auto* data) {
      for (int64_t c = 0; c < channels; ++c) {
        double sum = 0;
        for (int64_t r = 0; r < repeats; ++r) {
          const auto* at = data + (r * channels + c) * column;
          sum += batch_value([&](StatRow which) { return double(at[which * row]); });
        }
        folded[size_t(c)] += factor * (sum / double(repeats) - folded[size_t(c)]);
      }
    });
    note_write(running);
    const int64_t step = running.stride(0);
    with_type(dtype_of(running), running.data_ptr(), [&](auto* buffer) {
      using B = std::remove_reference_t<decltype(*buffer)>;
      for (int64_t c = 0; c < channels; ++c) buffer[c * step] = static_cast<B>(folded[size_t(c)]);
    });
  };
  fold(t.mean, [](auto get) { return get(kMean) + get(kMeanLow); });
  fold(t.var, [&](auto get) {
    const double rstd = get(kRstd), biased = 1.0 / (rstd * rstd) - t.eps;
    return (biased < 0 ? 0 : biased) * unbiased;
  });
  fold(t.lmbda, [](auto get) { return get(kLmbda); });
}

}  // namespace
}  // namespace normnorm

STABLE_TORCH_LIBRARY_IMPL(normnorm_cpu, CPU, m) {
  normnorm::Ops<normnorm::run_forward, normnorm::run_backward, normnorm::run_fold>::implement(m);
  m.impl("round_", TORCH_BOX(&normnorm::round_<normnorm::run_round>));
}

// How this library was built and what it chose, for `normnorm doctor`; read through ctypes.
extern "C" __attribute__((visibility("default"))) const char* normnorm_cpu_isa() {
  thread_local std::string text;
  try {
    text = normnorm::cpu::kernels().isa;
  } catch (const std::exception& e) {
    text = e.what();
  }
  return text.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* normnorm_build() {
  return "compiler: " __VERSION__ "; flags: " NN_BUILD_FLAGS;
}

// The version of the noise that all kernels of the library draw.
extern "C" __attribute__((visibility("default"))) int normnorm_stream_version() { return normnorm::kStreamVersion; }

// Why the library has no CUDA kernels; empty where it has them.
extern "C" __attribute__((visibility("default"))) const char* normnorm_without_cuda() { return NN_WITHOUT_CUDA; }
