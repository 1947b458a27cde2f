// Operations fused with a pass, on a row of elements: the addend before the forward pass; the residual and the
// activation after it; the activation's mask before the backward pass, and the gradient of the sum after it.
#pragma once

#include "workspace.h"

namespace normnorm {
namespace {

// to = a + b
template <class T>
NN_HD void add_row(T* to, const T* a, const T* b, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] = a[i] + b[i];
}

// A NaN stays one.
template <class T>
NN_HD void relu_row(T* x, int64_t size) {
  for (int64_t i = 0; i < size; ++i) x[i] = x[i] < T(0) ? T(0) : x[i];
}

// The gradient before an activation whose output is y. ReLU's passes where y is NaN.
template <class T>
NN_HD void mask_row(Activation activation, T* to, const T* g, const T* y, int64_t size) {
  if (activation != Activation::kRelu) return;
  for (int64_t i = 0; i < size; ++i) to[i] = y[i] <= T(0) ? T(0) : g[i];
}

inline bool has_activation(const cpu::Problem& p) { return p.activation != Activation::kNone; }
inline bool has_epilogue(const cpu::Problem& p) { return has_activation(p) || p.residual.data; }

// x = act(x + residual), without the sum where residual is null.
template <class T>
NN_HD void epilogue_row(const cpu::Problem& p, T* x, const T* residual, int64_t size) {
  if (residual) add_row(x, x, residual, size);
  if (p.activation == Activation::kRelu) relu_row(x, size);
}

// The tensor that is normalized: the input, or its sum with the addend, which a forward pass writes first.
inline const Operand& normalized(const cpu::Problem& p) { return p.addend.data ? p.sum : p.input; }

}  // namespace
}  // namespace normnorm
