// What a pass joins to itself, a row of elements at a time: the residual stream's sum, a residual and an activation
// behind the affine map, the activation's mask in front of the backward pass.
#pragma once

#include "workspace.h"

namespace normnorm {
namespace {

// to = a + b
template <class T>
NN_HD void add_row(T* to, const T* a, const T* b, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = a[i] + b[i];
}

// The positive part; a NaN stays one.
template <class T>
NN_HD void relu_row(T* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] = x[i] < T(0) ? T(0) : x[i];
}

// What of a gradient passes through a positive part that came out as y: where that is a NaN, all of it.
template <class T>
NN_HD void mask_row(T* to, const T* g, const T* y, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = y[i] <= T(0) ? T(0) : g[i];
}

// Whether anything stands behind the affine map.
inline bool has_epilogue(const cpu::Problem& p) { return p.relu || p.residual.data; }

// What stands there: x = act(x + residual), residual null where there is none.
template <class T>
NN_HD void epilogue_row(const cpu::Problem& p, T* x, const T* residual, int64_t size) {
  if (residual) add_row(x, x, residual, size);
  if (p.relu) relu_row(x, size);
}

// What is normalized: the input, or its sum with the addend, once that is written.
inline const Operand& normalized(const cpu::Problem& p) { return p.addend.data ? p.sum : p.input; }

}  // namespace
}  // namespace normnorm
