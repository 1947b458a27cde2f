// From shapes and numbers to the CUDA kernels' problem, all but its pointers. No torch here: `normnorm doctor
// --plan` asks for plans of tensors that do not exist.
#pragma once

#include "../common/checks.h"
#include "../common/layout.h"
#include "../cuda/params.h"

namespace normnorm {

// Whether a pass reads or writes noise in an order that no walk of these kernels can follow: that of a channels_last
// tensor whose groups are whole runs of its spatial axes.
bool noise_order_is_out_of_reach(const TensorView& input, const Config& c);

// The walk that suits `output`, the tensor to be written, and the input; where there is noise, the one that follows
// the noise's order.
Layout cuda_layout(const TensorView& input, const TensorView& output, const Config& c, bool noise);

// Throws std::invalid_argument where the walk is longer than the kernels count.
cuda::Problem cuda_problem(Storage storage, const Layout& layout, const Config& c, bool noise);

}  // namespace normnorm
