// What a pass joins to itself, a chunk of elements at a time, as csrc/cpu/joined.h: the residual stream's sum in front
// of the forward pass, a residual and an activation behind the affine map; the activation's mask in front of the
// backward pass, the gradient that reached the sum itself behind it.
//
// Kernels are compiled without all this and, kJoined, with it; those ask at run time which of it is wanted. `at` is a
// chunk's place in any tensor, as the walk knows it: fetch(tensor, raw) asks for the chunk, values(tensor, raw, out)
// takes it, write(tensor, in) puts it there.
#pragma once

#include <type_traits>

#include "storage.cuh"

namespace normnorm {
namespace cuda {
namespace {

// x + b
template <int N, class Real>
__device__ __forceinline__ void add_chunk(Real (&x)[N], const Real (&b)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] += b[j];
}

// The positive part; a NaN stays one.
template <int N, class Real>
__device__ __forceinline__ void relu_chunk(Real (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = x[j] < Real(0) ? Real(0) : x[j];
}

// What of a gradient passes through a positive part that came out as y: where that is a NaN, all of it.
template <int N, class Real>
__device__ __forceinline__ void mask_chunk(Real (&g)[N], const Real (&y)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] = y[j] <= Real(0) ? Real(0) : g[j];
}

// A chunk that joined kernels ask for ahead; nothing in the others, nor where it is read late (kLate).
template <class T, bool kJoined, bool kLate>
using Extra = Fetched<T, kLate || !kJoined>;

// Whether a kernel draws noise. Joined ones are compiled for noise alone, and ask: twice as many of them would cost
// more than the round that they take in vain without it.
template <bool kNoise, bool kJoined, class Args>
__device__ __forceinline__ bool draws_noise(const Args& a) {
  return kNoise && (!kJoined || a.noise);
}

template <bool kJoined, class At, class Tensor, class Raw>
__device__ __forceinline__ void fetch_joined(const At& at, const Tensor& tensor, Raw& raw) {
  if constexpr (kJoined)
    if (tensor.data) at.fetch(tensor, raw);
}

// The same of the mask; where there is none, numbers that let everything pass: a branch around the mask would have all of
// the gradient unpacked at its end, in registers that there are not.
template <bool kJoined, class At, class Tensor, class Raw>
__device__ __forceinline__ void fetch_mask(const At& at, const Tensor& activated, Raw& raw) {
  if constexpr (kJoined && !std::is_empty_v<Raw>) {
    if (activated.data) at.fetch(activated, raw);
    else raw.raw = {0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f, 0x3f3f3f3f};
  }
}

// What is normalized, from the input: its sum with the addend, rounded as it is stored.
template <class T, bool kJoined, class At, class Joined, class Raw, int N, class Real>
__device__ __forceinline__ void join_addend(const At& at, const Joined& joined, const Raw& raw, Real (&u)[N]) {
  if constexpr (kJoined) {
    if (!joined.addend.data) return;
    Real addend[N];
    at.values(joined.addend, raw, addend);
    add_chunk(u, addend);
    round_chunk<T>(u);
  }
}
// The same, and the sum is written.
template <class T, bool kJoined, class At, class Joined, class Raw, int N, class Real>
__device__ __forceinline__ void keep_sum(const At& at, const Joined& joined, const Raw& raw, Real (&u)[N]) {
  if constexpr (kJoined) {
    join_addend<T, kJoined>(at, joined, raw, u);
    if (joined.addend.data) at.write(joined.sum, u);
  }
}

// What stands behind the affine map.
template <bool kJoined, class At, class Joined, class Raw, int N, class Real>
__device__ __forceinline__ void join_output(const At& at, const Joined& joined, const Raw& raw, Real (&x)[N]) {
  if constexpr (kJoined) {
    if (joined.residual.data) {
      Real residual[N];
      at.values(joined.residual, raw, residual);
      add_chunk(x, residual);
    }
    if (joined.relu) relu_chunk(x);
  }
}

// The gradient in front of the activation, from the output's.
template <bool kJoined, class At, class Joined, class Raw, int N, class Real>
__device__ __forceinline__ void join_mask(const At& at, const Joined& joined, const Raw& raw, Real (&g)[N]) {
  if constexpr (kJoined) {
    if (std::is_empty_v<Raw> && !joined.activated.data) return;
    Real activated[N];
    at.values(joined.activated, raw, activated);
    mask_chunk(g, activated);
  }
}

// Adds the gradient that reached the sum itself to the input's.
template <bool kJoined, class At, class Joined, class Raw, int N, class Real>
__device__ __forceinline__ void join_sum_gradient(const At& at, const Joined& joined, const Raw& raw, Real (&du)[N]) {
  if constexpr (kJoined) {
    if (!joined.grad_sum.data) return;
    Real gradient[N];
    at.values(joined.grad_sum, raw, gradient);
    add_chunk(du, gradient);
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
