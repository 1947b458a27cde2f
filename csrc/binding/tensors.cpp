#include "tensors.h"

#include <torch/csrc/stable/stableivalue_conversions.h>

#include <limits>
#include <vector>

namespace normnorm {
namespace {

int32_t torch_dtype(Dtype d) {
  switch (d) {
    case Dtype::kFloat64:
      return aoti_torch_dtype_float64();
    case Dtype::kFloat32:
      return aoti_torch_dtype_float32();
    case Dtype::kBFloat16:
      return aoti_torch_dtype_bfloat16();
    case Dtype::kFloat16:
      return aoti_torch_dtype_float16();
    default:
      return aoti_torch_dtype_int64();
  }
}

// The name of a dtype that no op takes, for the sentence that says so.
const char* other_dtype_name(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  const struct {
    int32_t dtype;
    const char* name;
  } names[] = {{aoti_torch_dtype_bool(), "torch.bool"},
               {aoti_torch_dtype_int8(), "torch.int8"},
               {aoti_torch_dtype_int16(), "torch.int16"},
               {aoti_torch_dtype_int32(), "torch.int32"},
               {aoti_torch_dtype_uint8(), "torch.uint8"},
               {aoti_torch_dtype_uint16(), "torch.uint16"},
               {aoti_torch_dtype_uint32(), "torch.uint32"},
               {aoti_torch_dtype_uint64(), "torch.uint64"},
               {aoti_torch_dtype_complex32(), "torch.complex32"},
               {aoti_torch_dtype_complex64(), "torch.complex64"},
               {aoti_torch_dtype_complex128(), "torch.complex128"},
               {aoti_torch_dtype_float8_e5m2(), "torch.float8_e5m2"},
               {aoti_torch_dtype_float8_e4m3fn(), "torch.float8_e4m3fn"},
               {aoti_torch_dtype_float8_e5m2fnuz(), "torch.float8_e5m2fnuz"},
               {aoti_torch_dtype_float8_e4m3fnuz(), "torch.float8_e4m3fnuz"}};
  for (const auto& known : names)
    if (known.dtype == dtype) return known.name;
  return "another dtype";
}

Tensor dense_copy(const Tensor& t, const TensorView& v, const Layout& layout, bool fill) {
  std::vector<int64_t> strides(static_cast<size_t>(v.dim));
  layout.natural_strides(v, strides.data());
  Tensor copy = empty_strided(v.sizes, strides.data(), v.dim, v.dtype, v);
  if (fill) torch::stable::copy_(copy, t);
  return copy;
}

}  // namespace

Dtype dtype_of(const Tensor& t) {
  int32_t dtype = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &dtype));
  for (Dtype d : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16, Dtype::kInt64})
    if (dtype == torch_dtype(d)) return d;
  return Dtype::kOther;
}

Storage storage_of(Dtype d) {
  switch (d) {
    case Dtype::kFloat64:
      return Storage::kFloat64;
    case Dtype::kBFloat16:
      return Storage::kBFloat16;
    case Dtype::kFloat16:
      return Storage::kFloat16;
    default:
      return Storage::kFloat32;
  }
}

TensorView view(const Tensor& t) {
  TensorView v;
  v.given = true;
  v.dim = t.dim();
  v.sizes = t.sizes().data();
  v.strides = t.strides().data();
  v.dtype = dtype_of(t);
  if (v.dtype == Dtype::kOther) v.other_dtype = other_dtype_name(t);
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(t.get(), &v.device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(t.get(), &v.device_index));
  return v;
}

Tensor empty_strided(const int64_t* sizes, const int64_t* strides, int64_t dim, Dtype dtype, const TensorView& like) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, torch_dtype(dtype), like.device_type,
                                                  like.device_index, &handle));
  return Tensor(handle);
}

Tensor empty_contiguous(const int64_t* sizes, int64_t dim, Dtype dtype, const TensorView& like) {
  std::vector<int64_t> strides(static_cast<size_t>(dim));
  int64_t next = 1;
  for (int64_t i = dim - 1; i >= 0; --i) {
    strides[size_t(i)] = next;
    next *= sizes[i] > 1 ? sizes[i] : 1;
  }
  return empty_strided(sizes, strides.data(), dim, dtype, like);
}

Tensor empty_like(const Tensor& t, const TensorView& v) {
  // what aten::empty_like does for a contiguous tensor, without a trip through the dispatcher
  if (t.is_contiguous()) return empty_strided(v.sizes, v.strides, v.dim, v.dtype, v);
  return torch::stable::empty_like(t);
}

Tensor nothing(const TensorView& like) {
  const int64_t zero = 0, one = 1;
  return empty_strided(&zero, &one, 1, like.dtype, like);
}

Tensor draw_seed(const TensorView& like) {
  using torch::stable::detail::from;
  const int64_t one = 1;
  const Tensor seed = empty_contiguous(&one, 1, Dtype::kInt64, like);
  const std::optional<int64_t> most = std::numeric_limits<int64_t>::max();
  StableIValue stack[] = {from(seed), from(std::numeric_limits<int64_t>::min()), from(most), from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::random_", "from", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// The stable ABI has no way to move a tensor's version but an in-place operation; a copy onto itself is one, and
// ends before it touches memory.
void note_write(const Tensor& t) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(t.get(), t.get(), 0));
}

Source::Source(const Tensor& t, const Layout& layout) : tensor_(t) {
  auto strides = layout.strides(view(t));
  if (!strides) {
    tensor_ = dense_copy(t, view(t), layout, true);
    strides = layout.strides(view(tensor_));
  }
  operand = {tensor_.data_ptr(), *strides};
}

Target::Target(const Tensor& t, const Layout& layout, bool reads) : tensor_(t), dense_(t) {
  auto strides = layout.strides(view(t));
  if (!strides) {
    dense_ = dense_copy(t, view(t), layout, reads);
    strides = layout.strides(view(dense_));
  }
  operand = {dense_.data_ptr(), *strides};
}

void Target::finish() {
  if (dense_.get() != tensor_.get()) torch::stable::copy_(tensor_, dense_);
}

Arguments ForwardTensors::arguments() const {
  Arguments a;
  a.input = view(input);
  a.running_mean = view(mean), a.running_var = view(var), a.running_lmbda = view(lmbda);
  a.weight = view(weight), a.bias = view(bias), a.residual = view(residual);
  a.seed = view(seed), a.noise_scale = view(noise_scale);
  a.prenorm = prenorm;
  return a;
}

Arguments BackwardTensors::arguments() const {
  Arguments a;
  a.grad_output = view(grad_output), a.input = view(input), a.stats = view(stats);
  a.weight = view(weight), a.bias = view(bias), a.output = view(output), a.seed = view(seed);
  a.grad_sum = view(grad_sum);
  a.needs_weight = needs_weight, a.needs_bias = needs_bias;
  return a;
}

FoldArguments fold_arguments(const TensorView& stats, const Tensor& mean, const Tensor& var, const Tensor& lmbda,
                             const OptionalTensor& tracked, std::optional<double> momentum, int64_t count, double eps) {
  const void *first = mean.data_ptr(), *second = var.data_ptr(), *third = lmbda.data_ptr();
  const bool shared = first && (first == second || second == third || third == first);
  return {stats, view(mean), view(var), view(lmbda), view(tracked), momentum, count, eps, shared};
}

}  // namespace normnorm
