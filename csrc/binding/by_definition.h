// The definition in Python (normnorm/reference.py) on the tensors' own device, for the odd call that a device's
// kernels cannot serve.
#pragma once

#include "tensors.h"

namespace normnorm {

ForwardOutputs forward_by_definition(const ForwardTensors& t, const Config& c);
BackwardResult backward_by_definition(const BackwardTensors& t, const Config& c);

}  // namespace normnorm
