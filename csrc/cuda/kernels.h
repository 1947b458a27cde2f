// The passes of one storage type, each compiled in a file of its own.
#pragma once

#include "ladder.h"

namespace normnorm {
namespace cuda {

struct Passes {
  Plan (*plan)(const Problem&, bool backward, const Device&);
  size_t (*workspace)(const Problem&, bool backward, const Device&);
  int (*forward)(const Problem&, const Device&, void* stream);
  int (*backward)(const Problem&, const Device&, void* stream);
};

const Passes& float32_passes();
const Passes& float64_passes();
const Passes& bfloat16_passes();
const Passes& float16_passes();

}  // namespace cuda
}  // namespace normnorm
