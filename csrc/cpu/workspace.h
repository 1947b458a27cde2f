// Scratch memory and loops over the caller's threads.
#pragma once

#include <new>
#include <stdlib.h>

#include "io.h"
#include "params.h"

namespace normnorm {
namespace {

// Uninitialised memory, aligned to a cache line. Not std::vector, whose members are weak symbols that files compiled
// for different instruction sets would share.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t count) {
    const size_t bytes = (size_t(count > 0 ? count : 1) * sizeof(T) + 63) / 64 * 64;
    data_ = static_cast<T*>(::aligned_alloc(64, bytes));
    if (!data_) throw std::bad_alloc();
  }
  ~Buffer() { ::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  void zero(int64_t count) { memset(static_cast<void*>(data_), 0, size_t(count) * sizeof(T)); }

 private:
  T* data_;
};

// body(begin, end) over [0, count), on the pool's threads where `parallel`.
template <class F>
inline void for_range(const cpu::ThreadPool& pool, bool parallel, int64_t count, F body) {
  if (count <= 0) return;
  if (!parallel || pool.threads <= 1 || count == 1) return body(int64_t(0), count);
  pool.run(
      count, [](void* context, int64_t begin, int64_t end) { (*static_cast<F*>(context))(begin, end); },
      &body);
}

NN_HD int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
NN_HD int64_t clamped(int64_t a, int64_t low, int64_t high) { return a < low ? low : a > high ? high : a; }

}  // namespace
}  // namespace normnorm
