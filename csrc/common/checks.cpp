#include "checks.h"

#include <cmath>
#include <iterator>
#include <stdexcept>

#include "stats.h"

namespace normnorm {
namespace {

// The caller then runs normnorm/checks.py, which has a sentence for each rule.
void require(bool condition, const char* sentence = "the arguments do not fit the op") {
  if (!condition) throw std::invalid_argument(sentence);
}

bool floating(Dtype d) { return d != Dtype::kInt64 && d != Dtype::kOther; }

void check_config(const TensorView& input, const Config& c) {
  require(floating(input.dtype));
  const bool layer = c.kind == Kind::kLayer, group = c.kind == Kind::kGroup;
  require(layer ? c.normalized_ndim >= 1 && c.normalized_ndim <= input.dim
                : c.normalized_ndim == 0 && input.dim >= 2);
  require(group ? c.num_groups >= 1 && input.sizes[1] % c.num_groups == 0 : c.num_groups == 0);
  require(c.settings.valid());
  require(std::isfinite(c.noise_train) && c.noise_train >= 0);
  require(size_t(c.activation) < std::size(kActivationNames));
}

// A tensor of the input's shape and dtype on its device, or none.
void check_like_input(const TensorView& t, const TensorView& input) {
  if (!t.given) return;
  require(t.same_device(input) && t.has_shape(input.sizes, input.dim) && t.dtype == input.dtype);
}

void check_parameters(const Arguments& a, const Config& c) {
  const TensorView& input = a.input;
  const bool layer = c.kind == Kind::kLayer;
  const int64_t* shape = layer ? input.sizes + (input.dim - c.normalized_ndim) : input.sizes + 1;
  const int64_t dim = layer ? c.normalized_ndim : 1;
  for (const TensorView* p : {&a.weight, &a.bias}) {
    if (!p->given) continue;
    require(p->same_device(input) && p->has_shape(shape, dim));
    require(p->dtype == input.dtype || p->dtype == statistics_dtype(input.dtype));
  }
  require(!a.weight.given || !a.bias.given || a.weight.dtype == a.bias.dtype);
}

void check_noise(const Arguments& a, const Config& c, int64_t groups) {
  const int64_t one = 1;
  require(c.noise_train == 0 || a.seed.given || a.draws);
  if (a.seed.given)
    require(a.seed.same_device(a.input) && a.seed.dtype == Dtype::kInt64 && a.seed.has_shape(&one, 1));
  if (a.noise_scale.given)
    require(a.noise_scale.same_device(a.input) && a.noise_scale.has_shape(&groups, 1) &&
            a.noise_scale.dtype == statistics_dtype(a.input.dtype));
}

void check_stats(const Arguments& a, int64_t groups) {
  const int64_t shape[] = {kStatRows, groups};
  require(a.stats.same_device(a.input) && a.stats.has_shape(shape, 2) &&
          a.stats.dtype == statistics_dtype(a.input.dtype));
}

void check_channel_buffer(const TensorView& t, int64_t channels) {
  require(t.has_shape(&channels, 1) && floating(t.dtype));
}

void check_running(const Arguments& a, const Config& c) {
  const int given = int(a.running_mean.given) + int(a.running_var.given) + int(a.running_lmbda.given);
  if (!given) return;
  require(given == 3 && c.kind == Kind::kBatch && !a.prenorm);
  for (const TensorView* buffer : {&a.running_mean, &a.running_var, &a.running_lmbda}) {
    require(buffer->same_device(a.input));
    check_channel_buffer(*buffer, a.input.sizes[1]);
  }
}

}  // namespace

int64_t group_count(const TensorView& input, const Config& c) {
  switch (c.kind) {
    case Kind::kBatch:
      return input.sizes[1];
    case Kind::kLayer:
      return input.product(0, input.dim - c.normalized_ndim);
    case Kind::kGroup:
      return input.sizes[0] * c.num_groups;
    case Kind::kInstance:
      return input.sizes[0] * input.sizes[1];
  }
  return 0;
}

int64_t group_size(const TensorView& input, const Config& c) {
  if (c.kind == Kind::kLayer) return input.product(input.dim - c.normalized_ndim, input.dim);
  const int64_t spatial = input.product(2, input.dim);
  if (c.kind == Kind::kBatch) return input.sizes[0] * spatial;
  return c.kind == Kind::kGroup ? spatial * (input.sizes[1] / c.num_groups) : spatial;
}

void check_forward(const Arguments& a, const Config& c) {
  check_config(a.input, c);
  check_like_input(a.residual, a.input);
  require(!a.prenorm || a.residual.given);
  check_running(a, c);
  const bool own = !a.shard && !a.running_mean.given && (c.kind == Kind::kBatch || c.kind == Kind::kInstance);
  require(!own || group_size(a.input, c) != 1);
  check_noise(a, c, group_count(a.input, c));
  check_parameters(a, c);
}

void check_backward(const Arguments& a, const Config& c) {
  check_config(a.input, c);
  require(a.output.given == (c.activation != Activation::kNone));
  for (const TensorView* t : {&a.grad_output, &a.output, &a.grad_sum}) check_like_input(*t, a.input);
  const int64_t groups = group_count(a.input, c);
  check_stats(a, groups);
  check_noise(a, c, groups);
  check_parameters(a, c);
  require(!a.needs_weight || a.weight.given);
  require(!a.needs_bias || a.bias.given);
}

void check_round(const Arguments& a, const Config& c, int64_t sums) {
  require(c.kind == Kind::kBatch);
  if (a.grad_output.given) {
    check_backward(a, c);
  } else {
    check_forward(a, c);
    check_stats(a, group_count(a.input, c));
  }
  check_like_input(a.result, a.input);
  const int64_t shape[] = {sums, group_count(a.input, c)};
  require(a.sums.given == (sums > 0));
  if (sums > 0)
    require(a.sums.same_device(a.input) && a.sums.has_shape(shape, 2) && a.sums.dtype == Dtype::kFloat64);
}

void check_fold(const FoldArguments& a) {
  require(std::isfinite(a.eps) && a.eps > 0 && a.count >= 2);
  require(a.stats.dim == 2 && a.stats.sizes[0] == kStatRows);
  require(a.stats.dtype == Dtype::kFloat32 || a.stats.dtype == Dtype::kFloat64);
  require(a.running_mean.dim == 1);
  const int64_t channels = a.running_mean.sizes[0];
  for (const TensorView* buffer : {&a.running_mean, &a.running_var, &a.running_lmbda}) {
    check_channel_buffer(*buffer, channels);
    require(buffer->same_device(a.stats) && (channels <= 1 || buffer->strides[0] != 0));
  }
  // Views of one buffer are different tensors in Python.
  require(!a.shared_buffers,
          "running_mean, running_var and running_lmbda must be three buffers; got the same memory twice");
  require(channels > 0 && a.stats.sizes[1] > 0 && a.stats.sizes[1] % channels == 0);
  const TensorView& tracked = a.num_batches_tracked;
  if (tracked.given)
    require(tracked.same_device(a.stats) && tracked.dtype == Dtype::kInt64 && tracked.numel() == 1);
  require(a.momentum ? std::isfinite(*a.momentum) : tracked.given);
}

}  // namespace normnorm
