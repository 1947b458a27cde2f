// Shared by the ops of all devices: views and operands of torch's tensors. Only this folder includes torch, and only
// its stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>

#include "../common/checks.h"
#include "../common/layout.h"
#include "../common/stats.h"

namespace normnorm {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

TensorView view(const Tensor& t);
inline TensorView view(const OptionalTensor& t) { return t ? view(*t) : TensorView(); }
Dtype dtype_of(const Tensor& t);
Storage storage_of(Dtype d);

// Uninitialised memory on the device of `like`.
Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype, const TensorView& like);
Tensor empty_contiguous(const int64_t* sizes, int64_t dim, Dtype dtype, const TensorView& like);
Tensor empty_like(const Tensor& t, const TensorView& v);
// What an op returns in place of a gradient that is not wanted.
Tensor nothing(const TensorView& like);

// A seed from the default generator of a device, the one that torch.randint would draw.
Tensor draw_seed(const TensorView& like);

// Tells autograd that a tensor changes, as every in-place operation of torch does: a graph that saved it then
// refuses to go backward. The tensor's contents stay.
void note_write(const Tensor& t);

// A tensor that the kernels read: itself, or a dense copy where its strides do not fit the layout.
class Source {
 public:
  Source(const Tensor& t, const Layout& layout);
  Operand operand;

 private:
  Tensor tensor_;
};

// The same of one that need not be there: null data then.
class OptionalSource {
 public:
  OptionalSource(const OptionalTensor& t, const Layout& layout) {
    if (t) operand = source_.emplace(*t, layout).operand;
  }
  Operand operand;

 private:
  std::optional<Source> source_;
};

// A tensor that the kernels write; finish() copies a dense substitute back to it. `reads`: the kernels read it too.
class Target {
 public:
  Target(const Tensor& t, const Layout& layout, bool reads = false);
  void finish();
  Operand operand;

 private:
  Tensor tensor_, dense_;
};

// The tensors of the ops, in the order of their schemas (normnorm/ops.py).
struct ForwardTensors {
  const Tensor& input;
  const OptionalTensor &mean, &var, &lmbda, &weight, &bias, &residual, &seed, &noise_scale;
  bool prenorm;  // the residual is added to the input, not to the output
  bool keep_stats;

  Arguments arguments() const;
};

struct BackwardTensors {
  const Tensor &grad_output, &input, &stats;
  const OptionalTensor &weight, &bias, &output, &seed, &grad_sum;
  bool needs_input, needs_weight, needs_bias, frozen;

  Arguments arguments() const;
};

struct FoldTensors {
  const Tensor &stats, &mean, &var, &lmbda;
  const OptionalTensor& tracked;
  std::optional<double> momentum;
  int64_t count;
  double eps;
};

FoldArguments fold_arguments(const TensorView& stats, const Tensor& mean, const Tensor& var, const Tensor& lmbda,
                             const OptionalTensor& tracked, std::optional<double> momentum, int64_t count, double eps);

using ForwardResult = std::tuple<Tensor, OptionalTensor, OptionalTensor>;           // output, statistics, sum
using BackwardResult = std::tuple<Tensor, Tensor, Tensor>;                     // gradients of input, weight and bias

}  // namespace normnorm
