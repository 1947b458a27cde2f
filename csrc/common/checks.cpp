#include "checks.h"

#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "stats.h"

namespace normnorm {
namespace {

// `sentence` is a callable, so that the message is formatted only on failure.
template <class F>
void require(bool condition, F sentence) {
  if (!condition) throw std::invalid_argument(sentence());
}

// The shortest text that reads back as the number, as Python prints it.
std::string text(double v) {
  if (!std::isfinite(v)) return std::to_string(v);
  char digits[32];
  for (int count = 1; count <= 17; ++count) {
    std::snprintf(digits, sizeof digits, "%.*g", count, v);
    if (std::strtod(digits, nullptr) == v) break;
  }
  const std::string s = digits;
  return s.find_first_of(".e") == std::string::npos ? s + ".0" : s;
}

bool floating(Dtype d) { return d != Dtype::kInt64 && d != Dtype::kOther; }

void check_geometry(const TensorView& input, Config& c) {
  require(floating(input.dtype), [&] {
    return std::string("input must be float64, float32, bfloat16 or float16; got ") + dtype_name(input);
  });
  const bool layer = c.kind_name == "layer", group = c.kind_name == "group", batch = c.kind_name == "batch";
  require(layer || group || batch || c.kind_name == "instance",
          [&] { return "kind must be one of batch, layer, group, instance; got '" + c.kind_name + "'"; });
  c.kind = layer ? Kind::kLayer : group ? Kind::kGroup : batch ? Kind::kBatch : Kind::kInstance;
  if (layer) {
    require(c.normalized_ndim >= 1 && c.normalized_ndim <= input.dim, [&] {
      return "kind 'layer' normalizes between 1 and all of the input's trailing dimensions; got "
             "normalized_ndim " +
             std::to_string(c.normalized_ndim) + " for an input of shape " + shape_text(input);
    });
  } else {
    require(c.normalized_ndim == 0, [&] {
      return "normalized_ndim belongs to kind 'layer'; got " + std::to_string(c.normalized_ndim) +
             " for kind '" + c.kind_name + "'";
    });
    require(input.dim >= 2, [&] {
      return "kind '" + c.kind_name + "' wants an input of shape (N, C, ...); got shape " + shape_text(input);
    });
  }
  if (group) {
    require(c.num_groups >= 1,
            [&] { return "num_groups must be positive; got " + std::to_string(c.num_groups); });
    require(input.sizes[1] % c.num_groups == 0, [&] {
      return "num_channels (" + std::to_string(input.sizes[1]) + ") must be divisible by num_groups (" +
             std::to_string(c.num_groups) + ")";
    });
  } else {
    require(c.num_groups == 0, [&] {
      return "num_groups belongs to kind 'group'; got " + std::to_string(c.num_groups) + " for '" +
             c.kind_name + "'";
    });
  }
}

void check_numbers(const Config& c) {
  require(std::isfinite(c.eps) && c.eps > 0,
          [&] { return "eps must be positive and finite; got " + text(c.eps); });
  require(c.eps >= FLT_MIN && c.eps <= FLT_MAX, [&] {
    return "eps must lie between 1.1755e-38 and 3.4028e+38, what float32 holds in full; got " + text(c.eps);
  });
  require(std::isfinite(c.alpha), [&] { return "alpha must be finite; got " + text(c.alpha); });
  require(c.order == 1 || c.order == 2,
          [&] { return "order must be 1 or 2; got " + std::to_string(c.order); });
  require(std::isfinite(c.transform_eps) && c.transform_eps >= 0,
          [&] { return "transform_eps must be finite and at least 0; got " + text(c.transform_eps); });
}

void check_activation(const Config& c) {
  require(c.activation.empty() || c.activation == "relu",
          [&] { return "activation must be 'relu' or '' for none; got '" + c.activation + "'"; });
}

void check_device(const char* name, const TensorView& t, const TensorView& input) {
  require(t.same_device(input),
          [&] { return std::string(name) + " must be on the input's device; got another one"; });
}

void check_shape(const char* name, const TensorView& t, const int64_t* shape, int64_t dim, const char* why) {
  require(t.has_shape(shape, dim), [&] {
    return std::string(name) + " must have shape " + shape_text(shape, dim) + why + "; got " + shape_text(t);
  });
}

// An optional tensor of the input's shape, dtype and device.
void check_like_input(const char* name, const TensorView& t, const TensorView& input) {
  if (!t.given) return;
  check_device(name, t, input);
  require(t.has_shape(input.sizes, input.dim), [&] {
    return std::string(name) + " must have the input's shape " + shape_text(input) + "; got " + shape_text(t);
  });
  require(t.dtype == input.dtype, [&] {
    return std::string(name) + " must have the input's dtype " + dtype_name(input) + "; got " + dtype_name(t);
  });
}

void check_parameters(const Arguments& a, const Config& c) {
  const TensorView& input = a.input;
  const bool layer = c.kind == Kind::kLayer;
  const int64_t* shape = layer ? input.sizes + (input.dim - c.normalized_ndim) : input.sizes + 1;
  const int64_t dim = layer ? c.normalized_ndim : 1;
  const Dtype wide = statistics_dtype(input.dtype);
  const TensorView* parameters[] = {&a.weight, &a.bias};
  const char* names[] = {"weight", "bias"};
  for (int i = 0; i < 2; ++i) {
    const TensorView& p = *parameters[i];
    if (!p.given) continue;
    check_device(names[i], p, input);
    check_shape(names[i], p, shape, dim, " for this input");
    require(p.dtype == input.dtype || p.dtype == wide, [&] {
      return std::string(names[i]) + " must have the input's dtype " + dtype_name(input) +
             (input.dtype == wide ? "" : std::string(" or ") + name_of(wide)) + "; got " + dtype_name(p);
    });
  }
  require(!a.weight.given || !a.bias.given || a.weight.dtype == a.bias.dtype, [&] {
    return std::string("weight and bias must have one dtype; got ") + dtype_name(a.weight) + " and " +
           dtype_name(a.bias);
  });
}

void check_noise(const Arguments& a, const Config& c, int64_t groups) {
  require(std::isfinite(c.noise_train) && c.noise_train >= 0,
          [&] { return "noise_train must be finite and at least 0; got " + text(c.noise_train); });
  require(c.noise_train == 0 || a.seed.given,
          [] { return std::string("noise_train > 0 needs a seed tensor; got None"); });
  if (a.seed.given) {
    check_device("seed", a.seed, a.input);
    require(a.seed.dtype == Dtype::kInt64,
            [&] { return std::string("seed must be an int64 tensor; got ") + dtype_name(a.seed); });
    const int64_t one = 1;
    require(a.seed.has_shape(&one, 1),
            [&] { return "seed must have shape (1,); got shape " + shape_text(a.seed); });
  }
  if (a.noise_scale.given) {
    check_device("noise_scale", a.noise_scale, a.input);
    check_shape("noise_scale", a.noise_scale, &groups, 1, ", one for each group");
    require(a.noise_scale.dtype == statistics_dtype(a.input.dtype), [&] {
      return std::string("noise_scale must be ") + name_of(statistics_dtype(a.input.dtype)) +
             " for this input; got " + dtype_name(a.noise_scale);
    });
  }
}

void check_channel_buffer(const char* name, const TensorView& t, int64_t channels) {
  check_shape(name, t, &channels, 1, ", one for each channel");
  require(floating(t.dtype), [&] {
    return std::string(name) + " must be float64, float32, bfloat16 or float16; got " + dtype_name(t);
  });
}

void check_running(const Arguments& a, const Config& c) {
  const TensorView* buffers[] = {&a.running_mean, &a.running_var, &a.running_lmbda};
  const char* names[] = {"running_mean", "running_var", "running_lmbda"};
  const int given = int(a.running_mean.given) + int(a.running_var.given) + int(a.running_lmbda.given);
  if (!given) return;
  require(given == 3, [&] {
    return "running_mean, running_var and running_lmbda must be given together or not at all; got " +
           std::to_string(given) + " of them";
  });
  require(c.kind == Kind::kBatch,
          [&] { return "running statistics belong to kind 'batch'; got kind '" + c.kind_name + "'"; });
  for (int i = 0; i < 3; ++i) {
    check_device(names[i], *buffers[i], a.input);
    check_channel_buffer(names[i], *buffers[i], a.input.sizes[1]);
  }
}

void check_group_size(const TensorView& input, const Config& c) {
  if (c.kind != Kind::kBatch && c.kind != Kind::kInstance) return;
  require(group_size(input, c) != 1, [&] {
    std::string shape = shape_text(input);
    shape = "[" + shape.substr(1, shape.size() - (input.dim == 1 ? 3 : 2)) + "]";
    return std::string("Expected more than 1 ") +
           (c.kind == Kind::kBatch ? "value per channel" : "spatial element") +
           " when training, got input size " + shape;
  });
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

void check_forward(const Arguments& a, Config& c) {
  check_geometry(a.input, c);
  check_numbers(c);
  check_activation(c);
  check_like_input("residual", a.residual, a.input);
  check_running(a, c);
  if (!a.running_mean.given) check_group_size(a.input, c);
  check_noise(a, c, group_count(a.input, c));
  check_parameters(a, c);
}

void check_backward(const Arguments& a, Config& c) {
  check_geometry(a.input, c);
  check_numbers(c);
  check_activation(c);
  check_like_input("grad_output", a.grad_output, a.input);
  require(c.activation.empty() || a.output.given, [&] {
    return "activation '" + c.activation + "' needs the forward's output; got None";
  });
  require(!c.activation.empty() || !a.output.given, [] {
    return std::string("output belongs to an activation; got a tensor and activation ''");
  });
  check_like_input("output", a.output, a.input);
  check_like_input("grad_sum", a.grad_sum, a.input);
  const int64_t groups = group_count(a.input, c);
  check_device("stats", a.stats, a.input);
  const int64_t shape[] = {kStatRows, groups};
  check_shape("stats", a.stats, shape, 2, " for this input");
  require(a.stats.dtype == statistics_dtype(a.input.dtype), [&] {
    return std::string("stats must be ") + name_of(statistics_dtype(a.input.dtype)) +
           " for this input; got " + dtype_name(a.stats);
  });
  check_noise(a, c, groups);
  check_parameters(a, c);
  require(!a.needs_weight || a.weight.given,
          [] { return std::string("needs_weight asks for weight; got None"); });
  require(!a.needs_bias || a.bias.given, [] { return std::string("needs_bias asks for bias; got None"); });
}

void check_fold(const FoldArguments& a) {
  require(std::isfinite(a.eps) && a.eps > 0,
          [&] { return "eps must be positive and finite; got " + text(a.eps); });
  require(a.count >= 2, [&] {
    return "running statistics need at least 2 elements a group; got count " + std::to_string(a.count);
  });
  require(a.stats.dim == 2 && a.stats.sizes[0] == kStatRows, [&] {
    return "stats must have shape (" + std::to_string(int(kStatRows)) + ", groups); got " +
           shape_text(a.stats);
  });
  require(a.stats.dtype == Dtype::kFloat32 || a.stats.dtype == Dtype::kFloat64,
          [&] { return std::string("stats must be float32 or float64; got ") + dtype_name(a.stats); });
  require(a.running_mean.dim == 1,
          [&] { return "running_mean must have shape (C,); got " + shape_text(a.running_mean); });
  const int64_t channels = a.running_mean.sizes[0];
  const TensorView* buffers[] = {&a.running_mean, &a.running_var, &a.running_lmbda, &a.num_batches_tracked};
  const char* names[] = {"running_mean", "running_var", "running_lmbda", "num_batches_tracked"};
  for (int i = 0; i < 4; ++i) {
    if (!buffers[i]->given) continue;
    if (i < 3) {
      check_channel_buffer(names[i], *buffers[i], channels);
      require(channels <= 1 || buffers[i]->strides[0] != 0, [&] {
        return std::string(names[i]) + " must have memory for each channel; got one element expanded to " +
               std::to_string(channels);
      });
    }
    require(buffers[i]->same_device(a.stats),
            [&] { return std::string(names[i]) + " must be on the statistics' device; got another one"; });
  }
  require(!a.shared_buffers, [] {
    return std::string("running_mean, running_var and running_lmbda must be three buffers; got the same memory twice");
  });
  require(channels > 0 && a.stats.sizes[1] > 0 && a.stats.sizes[1] % channels == 0, [&] {
    return "stats must hold a multiple of the " + std::to_string(channels) + " channels; got " +
           std::to_string(a.stats.sizes[1]) + " groups";
  });
  if (a.num_batches_tracked.given) {
    require(a.num_batches_tracked.dtype == Dtype::kInt64 && a.num_batches_tracked.numel() == 1, [&] {
      return std::string("num_batches_tracked must be one int64; got ") + dtype_name(a.num_batches_tracked) +
             " of shape " + shape_text(a.num_batches_tracked);
    });
  }
  if (a.momentum) {
    require(std::isfinite(*a.momentum),
            [&] { return "momentum must be finite or None; got " + text(*a.momentum); });
  } else {
    require(a.num_batches_tracked.given, [] {
      return std::string("momentum None (a cumulative average) needs num_batches_tracked; got None");
    });
  }
}

}  // namespace normnorm
