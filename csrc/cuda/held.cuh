// Where a team keeps its group between the rounds: the first chunks of each thread in its registers, the rest in
// shared memory, each thread in slots of its own, so that keeping needs no barrier.
#pragma once

#include "device.cuh"

namespace normnorm {
namespace cuda {
namespace {

template <class Real>
struct alignas(16) Four {
  Real v[4];
};

// kPlanes numbers an element; kRegister chunks of N elements a thread in registers; kShared: shared memory as well.
template <class Real, int N, int kRegister, int kPlanes, bool kShared = true>
class Held {
 public:
  using Chunk = Real[kPlanes][N];

  __device__ uint32_t mine() const { return mine_; }

  __device__ Held(uint32_t chunks, uint32_t rank, uint32_t size)
      : rank_(rank), size_(size), mine_(rank < chunks ? (chunks - rank + size - 1) / size : 0) {}

  // f(values, chunk number, register slot or kRegister) for this thread's chunks. kRead: the values of the round before are
  // wanted; kWrite: those that f leaves are to be kept.
  template <bool kRead, bool kWrite, class F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (uint32_t i = 0; i < kRegister; ++i) {
      if (i >= mine_) break;  // one way out, where a branch around each chunk would have to meet again after each
      f(register_[i], rank_ + i * size_, i);
    }
    if constexpr (kShared) each_shared<kRead, kWrite>(f);
  }

 private:
  template <bool kRead, bool kWrite, class F>
  __device__ __forceinline__ void each_shared(F f) {
    NN_DYNAMIC_SHARED(raw);
    Four<Real>* slot = reinterpret_cast<Four<Real>*>(raw) + threadIdx.x;
#pragma unroll 1
    for (uint32_t i = kRegister; i < mine_; ++i, slot += kFours * blockDim.x) {
      Chunk values;
      if constexpr (kRead) take(slot, values);
      f(values, rank_ + i * size_, kRegister);
      if constexpr (kWrite) keep(slot, values);
    }
  }

  static constexpr int kFours = kPlanes * N / 4;
  static __device__ __forceinline__ void take(const Four<Real>* slot, Chunk& values) {
#pragma unroll
    for (int q = 0; q < kFours; ++q) {
      const Four<Real> four = slot[q * blockDim.x];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[q / (N / 4)][q % (N / 4) * 4 + j] = four.v[j];
    }
  }
  static __device__ __forceinline__ void keep(Four<Real>* slot, const Chunk& values) {
#pragma unroll
    for (int q = 0; q < kFours; ++q) {
      Four<Real> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.v[j] = values[q / (N / 4)][q % (N / 4) * 4 + j];
      slot[q * blockDim.x] = four;
    }
  }

  Chunk register_[kRegister];
  uint32_t rank_, size_, mine_;  // mine: how many chunks are this thread's
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
