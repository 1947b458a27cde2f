// Fused elementwise operations, a chunk at a time. Forward: the addend before the norm, the residual and the activation
// after the affine map. Backward: the activation's mask on the incoming gradient, and the gradient of the sum added to the
// input's.
//
// Kernels are compiled without fused operations and, kFused, with all of them; a null pointer turns one off at run time.
// `at` is the place of a chunk in any tensor of the layout: at.fetch(tensor, raw) starts a load, at.values(tensor, raw,
// out) converts it, at.write(tensor, in) stores.
#pragma once

#include <type_traits>

#include "io.cuh"

namespace normnorm {
namespace cuda {
namespace {

// x += b
template <int N, class Real>
__device__ __forceinline__ void add_chunk(Real (&x)[N], const Real (&b)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] += b[j];
}

// ReLU; a NaN stays NaN.
template <int N, class Real>
__device__ __forceinline__ void relu_chunk(Real (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = x[j] < Real(0) ? Real(0) : x[j];
}

// The gradient of ReLU, whose output is y; where y is NaN the gradient passes.
template <int N, class Real>
__device__ __forceinline__ void mask_chunk(Real (&g)[N], const Real (&y)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] = y[j] <= Real(0) ? Real(0) : g[j];
}

// The load of a fused tensor's chunk; empty in kernels without fused operations, and where values() loads (kLate).
template <class T, bool kFused, bool kLate, class Place = InRegisters>
using FusedFetch = Fetched<T, kLate || !kFused, Place>;

// The loads of a chunk in the forward pass: the input and, fused, one tensor beside it.
template <class T, bool kFused, bool kLate, class Place>
struct InputFetch {
  Fetched<T, kLate, Place> u;
  FusedFetch<T, kFused, kLate, Place> beside;

  using Shared = InputFetch<T, kFused, kLate, InShared>;
  static constexpr uint32_t kChunks = kLate ? 0 : kFused ? 2 : 1;
  // at: of the first chunk; the others are `stride` apart
  __device__ __forceinline__ void place(uint4* at, uint32_t stride) { u.place(at), beside.place(at + stride); }
};
// In the backward pass, where kSum with the gradient of the sum.
template <class T, bool kFused, bool kSum, bool kLate, class Place>
struct GradientFetch {
  Fetched<T, kLate, Place> u, g;
  FusedFetch<T, kFused, kLate, Place> activated;
  FusedFetch<T, kFused && kSum, kLate, Place> grad_sum;

  using Shared = GradientFetch<T, kFused, kSum, kLate, InShared>;
  static constexpr uint32_t kChunks = kLate ? 0 : !kFused ? 2 : kSum ? 4 : 3;
  __device__ __forceinline__ void place(uint4* at, uint32_t stride) {
    u.place(at), g.place(at + stride), activated.place(at + 2 * stride), grad_sum.place(at + 3 * stride);
  }
};

// Whether a kernel draws noise. Fused kernels are compiled with noise only and test a flag: without noise they run one
// round too many, and the binary has half as many of them.
template <bool kNoise, bool kFused, class Args>
__device__ __forceinline__ bool draws_noise(const Args& a) {
  return kNoise && (!kFused || a.noise);
}

template <bool kFused, class At, class Tensor, class Raw>
__device__ __forceinline__ void fetch_fused(const At& at, const Tensor& tensor, Raw& raw) {
  if constexpr (kFused)
    if (tensor.data) at.fetch(tensor, raw);
}

// The same of the mask, the forward's output. Without an activation, positive numbers instead: a branch around the mask
// would keep the whole gradient unpacked in registers, which would spill.
template <bool kFused, class At, class Tensor, class Raw>
__device__ __forceinline__ void fetch_mask(const At& at, const Tensor& activated, Raw& raw) {
  if constexpr (kFused && !std::is_empty_v<Raw>) {
    if (activated.data) at.fetch(activated, raw);
    else raw.set({0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f});
  }
}

// Adds the addend to the input, and rounds the sum as it is stored.
template <class T, bool kFused, class At, class Tensors, class Raw, int N, class Real>
__device__ __forceinline__ void add_addend(const At& at, const Tensors& fused, const Raw& raw, Real (&u)[N]) {
  if constexpr (kFused) {
    if (!fused.addend.data) return;
    Real addend[N];
    at.values(fused.addend, raw, addend);
    add_chunk(u, addend);
    round_chunk<T>(u);
  }
}
// The same, and stores the sum.
template <class T, bool kFused, class At, class Tensors, class Raw, int N, class Real>
__device__ __forceinline__ void add_and_write_sum(const At& at, const Tensors& fused, const Raw& raw, Real (&u)[N]) {
  if constexpr (kFused) {
    add_addend<T, kFused>(at, fused, raw, u);
    if (fused.addend.data) at.write(fused.sum, u);
  }
}

// The residual and the activation after the affine map.
template <bool kFused, class At, class Tensors, class Raw, int N, class Real>
__device__ __forceinline__ void apply_epilogue(const At& at, const Tensors& fused, const Raw& raw, Real (&x)[N]) {
  if constexpr (kFused) {
    if (fused.residual.data) {
      Real residual[N];
      at.values(fused.residual, raw, residual);
      add_chunk(x, residual);
    }
    if (fused.activation == Activation::kRelu) relu_chunk(x);
  }
}

// The gradient before the activation, from the output's.
template <bool kFused, class At, class Tensors, class Raw, int N, class Real>
__device__ __forceinline__ void mask_gradient(const At& at, const Tensors& fused, const Raw& raw, Real (&g)[N]) {
  if constexpr (kFused) {
    if (std::is_empty_v<Raw> && !fused.activated.data) return;
    Real activated[N];
    at.values(fused.activated, raw, activated);
    mask_chunk(g, activated);
  }
}

// Adds the gradient of the sum to the input's.
template <bool kFused, class At, class Tensors, class Raw, int N, class Real>
__device__ __forceinline__ void add_sum_gradient(const At& at, const Tensors& fused, const Raw& raw, Real (&du)[N]) {
  if constexpr (kFused) {
    if (!fused.grad_sum.data) return;
    Real gradient[N];
    at.values(fused.grad_sum, raw, gradient);
    add_chunk(du, gradient);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
