// torch's threads as the CPU kernels want them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../cpu/params.h"

namespace normnorm {

inline cpu::ThreadPool torch_threads() {
  cpu::ThreadPool pool;
  pool.threads = int(torch::stable::get_num_threads());
  pool.run = [](int64_t count, cpu::RangeBody body, void* context) {
    torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  };
  return pool;
}

}  // namespace normnorm
