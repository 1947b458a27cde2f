// From shapes and strides to the walk of problem.h: which axes there are, and which tensors can be walked in
// place.
#pragma once

#include <optional>

#include "../arguments.h"
#include "problem.h"

namespace normnorm {
namespace cpu {

class Layout {
 public:
  // The walk that suits `output`, the tensor to be written, and the input.
  Layout(const TensorView& input, const TensorView& output, const Config& config);

  const Geometry& geometry() const { return geometry_; }
  Affine affine() const { return affine_; }

  // The strides by which this walk can go over a tensor of the input's shape; none where its memory is laid
  // out otherwise, and a copy with natural_strides() must stand in.
  std::optional<Strides> strides(const TensorView& t) const;

  // Strides, one per dimension, of a dense tensor that this walk can go over.
  void natural_strides(const TensorView& input, int64_t* strides) const;

  // Fills in where the elements of this walk lie in the canonical order of the noise.
  void place_noise(Noise& noise, bool channels_last) const;

 private:
  bool walkable(const TensorView& t, bool columns) const;
  std::optional<Strides> row_strides(const TensorView& t) const;
  std::optional<Strides> column_strides(const TensorView& t) const;

  Kind kind_;
  int64_t samples_ = 1, channels_ = 1, spatial_ = 1;  // (N, C, spatial) of the canonical order
  int64_t leading_ = 0;                               // dimensions before the normalized ones, kind layer
  int64_t channels_per_group_ = 1;
  Geometry geometry_;
  Affine affine_ = Affine::kPerGroup;
};

}  // namespace cpu
}  // namespace normnorm
