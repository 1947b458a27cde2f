// What a thread group keeps of its group between the rounds: the first chunks of each thread in registers, the rest in
// shared memory, in slots that only this thread uses, so that no barrier is needed.
#pragma once

#include <type_traits>

#include "io.cuh"

namespace normnorm {
namespace cuda {
namespace {

template <class Real>
struct alignas(16) Four {
  Real v[4];
};

// Chunks of two or three tensors that fused kernels load into registers at a time; more spill below sm_90 and from sm_120.
#if defined(__CUDA_ARCH__) && (__CUDA_ARCH__ < 900 || __CUDA_ARCH__ >= 1200)
constexpr uint32_t kFusedAhead = 1;
#else
constexpr uint32_t kFusedAhead = 2;
#endif

// kPlanes numbers an element; kRegister chunks of N elements a thread in registers, the others in shared memory.
template <class Real, int N, int kRegister, int kPlanes, bool kFused>
class TileCache {
 public:
  using Chunk = Real[kPlanes][N];

  __device__ uint32_t count() const { return count_; }  // this thread's chunks

  __device__ TileCache(uint32_t chunks, uint32_t rank, uint32_t size)
      : rank_(rank), size_(size), count_(rank < chunks ? (chunks - rank + size - 1) / size : 0) {}

  // f(values, chunk number, register slot or kRegister) for this thread's chunks. kRead: f reads the values of the round
  // before; kWrite: the values that f leaves are kept.
  template <bool kRead, bool kWrite, class F>
  __device__ __forceinline__ void each(F f) {
#pragma unroll
    for (uint32_t i = 0; i < kRegister; ++i) {
      if (i >= count_) break;  // a single exit: a branch around each chunk would have to reconverge after each
      f(register_[i], rank_ + i * size_, i);
    }
    each_shared<kRead, kWrite>(f);
  }

  // The first round: load(chunk number, raw) starts a load, f(values, chunk number, register slot or kRegister, raw) leaves
  // the values to keep. Several loads are in flight before the first is waited for: a memory latency of 700 ns needs 26 KB
  // in flight in every multiprocessor. Chunks for shared memory are copied to their own slots, kInFlight before they are
  // used, the first of them before those for registers; where a slot is too small for what f reads, they go through registers.
  template <class Raw, class InSlot = typename Raw::Shared, class Load, class F>
  __device__ __forceinline__ void fill(Load load, F f) {
    constexpr uint32_t kRegisterAhead = kFused ? kFusedAhead : kRegister;
    if constexpr (InSlot::kChunks == 0 || InSlot::kChunks > kFours) {
      registers_with<kRegisterAhead, Raw>(load, f);
      shared_with<false, true, Raw>(load, f);
    } else {
      NN_DYNAMIC_SHARED(shared);
      InSlot raw;
      const auto start = [&](uint32_t i, Four<Real>* to) {
        raw.place(reinterpret_cast<uint4*>(to), blockDim.x);
        if (i < count_) load(rank_ + i * size_, raw);
        commit_copies();
      };
      if (count_ > kRegister)
#pragma unroll
        for (uint32_t k = 0; k < kInFlight; ++k) start(kRegister + k, first_slot(shared) + k * kFours * blockDim.x);
      registers_with<kRegisterAhead, Raw>(load, f);
      Four<Real>* slot = first_slot(shared);
#pragma unroll 1
      for (uint32_t i = kRegister; i < count_; ++i, slot += kFours * blockDim.x) {
        wait_for_copies<kInFlight - 1>();
        Chunk values;
        raw.place(reinterpret_cast<uint4*>(slot), blockDim.x);
        f(values, rank_ + i * size_, kRegister, raw);
        store_slot(slot, values);
        start(i + kInFlight, slot + kInFlight * kFours * blockDim.x);
      }
    }
  }

  // each<true, false>() with a chunk loaded from memory beside each of the values: load() and f() as in fill().
  template <class Raw, class Load, class F>
  __device__ __forceinline__ void each_with(Load load, F f) {
    if constexpr (std::is_empty_v<Raw>) {
      each<true, false>([&](Chunk& values, uint32_t chunk, uint32_t slot) { f(values, chunk, slot, Raw()); });
    } else {
      registers_with<kFusedAhead, Raw>(load, f);
      shared_with<true, false, Raw>(load, f);
    }
  }

 private:
  static constexpr uint32_t kInFlight = 4;

  // With several planes recomputed in each round: kept between rounds it would take a register.
  static __device__ __forceinline__ Four<Real>* first_slot(unsigned char* shared) {
    return reinterpret_cast<Four<Real>*>(shared) + (kPlanes > 1 ? opaque(threadIdx.x) : threadIdx.x);
  }

  template <uint32_t kCount, class Raw, class Load, class F>
  __device__ __forceinline__ void registers_with(Load load, F f) {
#pragma unroll
    for (uint32_t first = 0; first < kRegister; first += kCount) {
      Raw raw[kCount];
#pragma unroll
      for (uint32_t k = 0; k < kCount && first + k < kRegister; ++k) {
        if (first + k >= count_) break;
        load(rank_ + (first + k) * size_, raw[k]);
      }
#pragma unroll
      for (uint32_t k = 0; k < kCount && first + k < kRegister; ++k) {
        if (first + k >= count_) break;
        f(register_[first + k], rank_ + (first + k) * size_, first + k, raw[k]);
      }
    }
  }

  template <bool kRead, bool kWrite, class Raw, class Load, class F>
  __device__ __forceinline__ void shared_with(Load load, F f) {
    constexpr uint32_t kCount = kFusedAhead;
    NN_DYNAMIC_SHARED(raw_shared);
    Four<Real>* slot = first_slot(raw_shared);
#pragma unroll 1
    for (uint32_t i = kRegister; i < count_; i += kCount) {
      Raw raw[kCount];
#pragma unroll
      for (uint32_t k = 0; k < kCount; ++k) {
        if (i + k < count_) load(rank_ + (i + k) * size_, raw[k]);
      }
#pragma unroll
      for (uint32_t k = 0; k < kCount; ++k) {
        if (i + k >= count_) break;
        Chunk values;
        if constexpr (kRead) load_slot(slot, values);
        f(values, rank_ + (i + k) * size_, kRegister, raw[k]);
        if constexpr (kWrite) store_slot(slot, values);
        slot += kFours * blockDim.x;
      }
    }
  }

  template <bool kRead, bool kWrite, class F>
  __device__ __forceinline__ void each_shared(F f) {
    NN_DYNAMIC_SHARED(raw);
    Four<Real>* slot = first_slot(raw);
#pragma unroll 1
    for (uint32_t i = kRegister; i < count_; ++i, slot += kFours * blockDim.x) {
      Chunk values;
      if constexpr (kRead) load_slot(slot, values);
      f(values, rank_ + i * size_, kRegister);
      if constexpr (kWrite) store_slot(slot, values);
    }
  }

  static constexpr int kFours = kPlanes * N / 4;
  static __device__ __forceinline__ void load_slot(const Four<Real>* slot, Chunk& values) {
#pragma unroll
    for (int q = 0; q < kFours; ++q) {
      const Four<Real> four = slot[q * blockDim.x];
#pragma unroll
      for (int j = 0; j < 4; ++j) values[q / (N / 4)][q % (N / 4) * 4 + j] = four.v[j];
    }
  }
  static __device__ __forceinline__ void store_slot(Four<Real>* slot, const Chunk& values) {
#pragma unroll
    for (int q = 0; q < kFours; ++q) {
      Four<Real> four;
#pragma unroll
      for (int j = 0; j < 4; ++j) four.v[j] = values[q / (N / 4)][q % (N / 4) * 4 + j];
      slot[q * blockDim.x] = four;
    }
  }

  Chunk register_[kRegister];
  uint32_t rank_, size_, count_;  // count: this thread's chunks
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
