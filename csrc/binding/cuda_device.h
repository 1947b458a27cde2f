// What the ops on CUDA tensors need of the CUDA runtime, for a file that does not include it.
#pragma once

namespace normnorm {

// The runtime's words for one of its error numbers.
const char* cuda_error_text(int error);

}  // namespace normnorm
