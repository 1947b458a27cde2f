// What a file that compiles one storage type's kernels includes: NN_PASSES(name, type).
#pragma once

#include "columns_launch.cuh"
#include "rows_launch.cuh"

namespace normnorm {
namespace cuda {
namespace {

// f(pass) in the layout of a problem.
template <class T, class F>
auto with_layout(const Problem& p, bool backward, const Device& device, void* stream, F f) {
  return p.geometry.columns ? f(ColumnsPass<T>(p, backward, device, stream))
                            : f(RowsPass<T>(p, backward, device, stream));
}

template <class T>
Passes passes() {
  return {[](const Problem& p, bool backward, const Device& d) {
            return with_layout<T>(p, backward, d, nullptr, [](const auto& pass) { return pass.plan(); });
          },
          [](const Problem& p, bool backward, const Device& d) {
            return with_layout<T>(p, backward, d, nullptr, [](const auto& pass) { return pass.workspace(); });
          },
          [](const Problem& p, const Device& d, void* stream) {
            return with_layout<T>(p, false, d, stream, [](const auto& pass) { return pass.forward(); });
          },
          [](const Problem& p, const Device& d, void* stream) {
            return with_layout<T>(p, true, d, stream, [](const auto& pass) { return pass.backward(); });
          }};
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm

#define NN_PASSES(name, T)                                 \
  const normnorm::cuda::Passes& normnorm::cuda::name() {   \
    static const Passes all = passes<T>();                 \
    return all;                                            \
  }
