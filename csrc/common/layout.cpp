#include "layout.h"

namespace normnorm {
namespace {

// The stride of dimensions [begin, end) as one axis; none where they cannot be viewed as one. An axis of one element
// has stride 1, whatever the tensor says.
std::optional<int64_t> merged_stride(const TensorView& t, int64_t begin, int64_t end) {
  int64_t inner = 0, expected = 0;
  bool any = false;
  for (int64_t i = end - 1; i >= begin; --i) {
    if (t.sizes[i] == 1) continue;
    if (!any) {
      inner = t.strides[i];
      any = true;
    } else if (t.strides[i] != expected) {
      return std::nullopt;
    }
    expected = t.strides[i] * t.sizes[i];
  }
  return any ? inner : 1;
}

int64_t axis_stride(const TensorView& t, int64_t i) { return t.sizes[i] == 1 ? 0 : t.strides[i]; }

}  // namespace

Layout::Layout(const TensorView& input, const TensorView& output, const Config& c) : kind_(c.kind) {
  if (input.dim >= 2) {
    samples_ = input.sizes[0];
    channels_ = input.sizes[1];
    spatial_ = input.product(2, input.dim);
  }
  if (kind_ == Kind::kLayer) {
    leading_ = input.dim - c.normalized_ndim;
    geometry_ = {false, 1, input.product(0, leading_), 1, input.product(leading_, input.dim)};
    affine_ = Affine::kPerElement;
    return;
  }
  if (kind_ == Kind::kGroup) channels_per_group_ = channels_ / c.num_groups;
  const bool rows_fit = spatial_ > 1 && fits(output, false);
  const bool columns_fit = fits(output, true);
  bool columns = spatial_ == 1;
  if (!columns && channels_ > 1) {
    if (rows_fit && columns_fit)
      columns = !fits(input, false) && fits(input, true);
    else
      columns = columns_fit;
  }
  const bool batch = kind_ == Kind::kBatch;
  const int64_t groups = channels_ / channels_per_group_;
  if (columns) {
    geometry_ = {true, batch ? 1 : samples_, groups, batch ? samples_ * spatial_ : spatial_,
                 channels_per_group_};
    affine_ = Affine::kPerColumn;
  } else {
    geometry_ = {false, batch ? 1 : samples_, groups, batch ? samples_ : channels_per_group_, spatial_};
    affine_ = channels_per_group_ > 1 ? Affine::kPerRun : Affine::kPerGroup;
  }
}

bool Layout::fits(const TensorView& t, bool columns) const {
  return (columns ? column_strides(t) : row_strides(t)).has_value();
}

std::optional<Strides> Layout::strides(const TensorView& t) const {
  return geometry_.columns ? column_strides(t) : row_strides(t);
}

std::optional<Strides> Layout::row_strides(const TensorView& t) const {
  if (kind_ == Kind::kLayer) {
    const auto inner = merged_stride(t, leading_, t.dim), outer = merged_stride(t, 0, leading_);
    if (!inner || !outer || *inner != 1) return std::nullopt;
    return Strides{0, *outer, 0};
  }
  const auto spatial = merged_stride(t, 2, t.dim);
  if (!spatial || *spatial != 1) return std::nullopt;
  const int64_t sample = axis_stride(t, 0), channel = axis_stride(t, 1);
  if (kind_ == Kind::kBatch) return Strides{0, channel, sample};
  return Strides{sample, channel * channels_per_group_, channel};
}

std::optional<Strides> Layout::column_strides(const TensorView& t) const {
  if (channels_ > 1 && t.strides[1] != 1) return std::nullopt;
  const auto spatial = merged_stride(t, 2, t.dim);
  if (!spatial) return std::nullopt;
  const int64_t sample = axis_stride(t, 0);
  if (kind_ != Kind::kBatch) return Strides{sample, channels_per_group_, spatial_ == 1 ? 0 : *spatial};
  if (spatial_ == 1) return Strides{0, 1, sample};
  if (samples_ > 1 && sample != *spatial * spatial_) return std::nullopt;
  return Strides{0, 1, *spatial};
}

void Layout::natural_strides(const TensorView& input, int64_t* strides) const {
  int64_t next = 1;
  if (geometry_.columns) {
    strides[1] = 1;
    next = channels_;
  }
  for (int64_t i = input.dim - 1; i >= 0; --i) {
    if (geometry_.columns && i == 1) continue;
    strides[i] = next;
    next *= input.sizes[i];
  }
}

NoiseOrder Layout::noise_order(bool channels_last) const {
  NoiseOrder order;
  const int64_t sample = channels_ * spatial_;
  if (kind_ == Kind::kLayer)
    order.position = {0, geometry_.length, 0};
  else if (geometry_.columns)
    order.position = {sample, channels_per_group_, channels_};
  else if (kind_ == Kind::kBatch)
    order.position = {0, spatial_, sample};
  else
    order.position = {sample, channels_per_group_ * spatial_, spatial_};
  // Indices are channels_last in the columns layout and row-major in the rows layout.
  order.transposed = channels_last != geometry_.columns && channels_ > 1 && spatial_ > 1;
  order.rows = geometry_.columns ? spatial_ : channels_;
  order.cols = geometry_.columns ? channels_ : spatial_;
  return order;
}

void Layout::set_params(PassParams& p, const Config& c, bool noise) const {
  p.geometry = geometry_;
  p.affine = affine_;
  p.settings = c.settings;
  p.activation = c.activation;
  if (!noise) return;
  p.noise = {noise_order(c.channels_last)};
  p.noise.on = true;
  p.noise.train = c.noise_train;
  p.noise.stream = static_cast<uint32_t>(c.stream);
}

}  // namespace normnorm
