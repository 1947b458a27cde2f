// A tensor's metadata, for the checks and the layout. Sizes and strides are not owned.
#pragma once

#include <cstdint>
#include <string>

namespace normnorm {

enum class Dtype { kFloat64, kFloat32, kBFloat16, kFloat16, kInt64, kOther };

inline const char* name_of(Dtype d) {
  switch (d) {
    case Dtype::kFloat64:
      return "torch.float64";
    case Dtype::kFloat32:
      return "torch.float32";
    case Dtype::kBFloat16:
      return "torch.bfloat16";
    case Dtype::kFloat16:
      return "torch.float16";
    case Dtype::kInt64:
      return "torch.int64";
    case Dtype::kOther:
      break;
  }
  return "another dtype";
}

struct TensorView {
  bool given = false;  // false: an optional tensor that is None
  int64_t dim = 0;
  const int64_t* sizes = nullptr;
  const int64_t* strides = nullptr;
  Dtype dtype = Dtype::kOther;
  const char* other_dtype = "another dtype";  // the name where dtype is kOther
  int32_t device_type = 0, device_index = 0;

  // The number of elements of dimensions [begin, end).
  int64_t product(int64_t begin, int64_t end) const {
    int64_t n = 1;
    for (int64_t i = begin; i < end; ++i) n *= sizes[i];
    return n;
  }
  int64_t numel() const { return product(0, dim); }
  bool has_shape(const int64_t* shape, int64_t rank) const {
    if (dim != rank) return false;
    for (int64_t i = 0; i < dim; ++i)
      if (sizes[i] != shape[i]) return false;
    return true;
  }
  bool same_device(const TensorView& other) const {
    return device_type == other.device_type && device_index == other.device_index;
  }
};

inline std::string shape_text(const int64_t* sizes, int64_t dim) {
  std::string text = "(";
  for (int64_t i = 0; i < dim; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + (dim == 1 ? ",)" : ")");
}
inline std::string dtype_name(const TensorView& t) {
  return t.dtype == Dtype::kOther ? t.other_dtype : name_of(t.dtype);
}

inline std::string shape_text(const TensorView& t) { return shape_text(t.sizes, t.dim); }

}  // namespace normnorm
