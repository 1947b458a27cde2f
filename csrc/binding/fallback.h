// The definition in Python (normnorm/reference.py) on the tensors' own device, for calls that a device's kernels do not
// cover.
#pragma once

#include "tensors.h"

namespace normnorm {

ForwardResult fallback_forward(const ForwardTensors& t, const Config& c);
BackwardResult fallback_backward(const BackwardTensors& t, const Config& c);

}  // namespace normnorm
