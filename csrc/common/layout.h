// From shapes and strides to the layout of params.h: which axes there are, and which tensors the kernels can access in
// place.
#pragma once

#include <optional>

#include "checks.h"
#include "params.h"

namespace normnorm {

class Layout {
 public:
  // The layout that suits `output`, the tensor to be written, and the input.
  Layout(const TensorView& input, const TensorView& output, const Config& config);

  const Geometry& geometry() const { return geometry_; }
  Affine affine() const { return affine_; }

  // The strides by which the kernels access a tensor of the input's shape; none where its memory has another order, so
  // that it must be copied into a tensor with natural_strides().
  std::optional<Strides> strides(const TensorView& t) const;

  // Strides, one per dimension, of a dense tensor in this layout.
  void natural_strides(const TensorView& input, int64_t* strides) const;

  NoiseOrder noise_order(bool channels_last) const;

  // Sets what follows from the layout and the configuration: the geometry, the numbers and, where there is any, the
  // noise.
  void set_params(PassParams& params, const Config& config, bool noise) const;

 private:
  bool fits(const TensorView& t, bool columns) const;
  std::optional<Strides> row_strides(const TensorView& t) const;
  std::optional<Strides> column_strides(const TensorView& t) const;

  Kind kind_;
  int64_t samples_ = 1, channels_ = 1, spatial_ = 1;  // (N, C, spatial) of the canonical order
  int64_t leading_ = 0;                               // kind layer: dimensions before the normalized ones
  int64_t channels_per_group_ = 1;
  Geometry geometry_;
  Affine affine_ = Affine::kPerGroup;
};

}  // namespace normnorm
