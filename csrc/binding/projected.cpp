// normnorm_cpu::projected_error_, the op of the projected error function loss (normnorm/per.py).
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "tensors.h"
#include "threads.h"

namespace normnorm {
namespace {

// The rules and sentences of triton_kernels/projected.py.
void check(const TensorView& projections, bool dense, const TensorView& sums, bool dense_sums) {
  if (projections.dtype != Dtype::kFloat32 && projections.dtype != Dtype::kFloat64)
    throw std::invalid_argument("projections must be float32 or float64; got " + dtype_name(projections));
  if (!dense)
    throw std::invalid_argument("projections must be contiguous, their slopes take their place; got strides " +
                                shape_text(projections.strides, projections.dim));
  if (sums.dtype != Dtype::kFloat64 || sums.dim != 1 || sums.sizes[0] == 0 || !dense_sums)
    throw std::invalid_argument("sums must be a contiguous vector of torch.float64, not empty; got " +
                                dtype_name(sums) + " of shape " + shape_text(sums));
  if (!sums.same_device(projections))
    throw std::invalid_argument("sums must be on the device of the projections");
}

void projected_error_(const Tensor& projections, const Tensor& sums, bool slopes) {
  const TensorView v = view(projections);
  check(v, projections.is_contiguous(), view(sums), sums.is_contiguous());
  cpu::Projections p;
  p.storage = storage_of(v.dtype);
  p.count = v.numel();
  p.data = projections.data_ptr();
  p.slopes = slopes;
  p.pool = torch_threads();
  if (slopes) note_write(projections);
  note_write(sums);
  *static_cast<double*>(sums.data_ptr()) += cpu::kernels().projected_error(p);
}

}  // namespace
}  // namespace normnorm

STABLE_TORCH_LIBRARY_IMPL(normnorm_cpu, CPU, m) {
  m.impl("projected_error_", TORCH_BOX(&normnorm::projected_error_));
}
