// The sum of the projected error function over projections, which its slopes overwrite: one pass over memory that a
// matrix product has just written.
#pragma once

#include "../math/projected_error.h"
#include "reduce.h"

namespace normnorm {
namespace {

template <class T>
class ProjectedSum {
 public:
  explicit ProjectedSum(const cpu::Projections& p) : p_(p), data_(static_cast<T*>(p.data)) {}

  double run() {
    const int64_t parts = ceil_div(p_.count, kPart);
    return reduce_parts<Sum>(p_.pool, parts > 1, parts, [&](int64_t i) {
             const int64_t begin = i * kPart, count = smaller(kPart, p_.count - begin);
             return p_.slopes ? part<true>(data_ + begin, count) : part<false>(data_ + begin, count);
           })
        .value;
  }

 private:
  using V = VectorOf<T>;
  struct Sum {
    double value = 0;
    void add(const Sum& other) { value += other.value; }
  };
  static constexpr int64_t kPart = 8192;           // elements, a few microseconds
  static constexpr int64_t kRun = 32 * kLanes<V>;  // elements summed in T

  template <bool kSlopes>
  static Sum part(T* data, int64_t count) {
    Sum sum;
    int64_t at = 0;
    while (count - at >= kLanes<V>) {
      const int64_t end = at + smaller(kRun, (count - at) / kLanes<V> * kLanes<V>);
      V run{};
      for (; at < end; at += kLanes<V>) {
        const auto e = projected_error<V>(load_dense<V>(data + at));
        if constexpr (kSlopes) store_dense<V>(data + at, e.slope);
        run += e.value;
      }
      sum.value += sum_lanes(run);
    }
    if (const int rest = int(count - at)) {
      const auto e = projected_error<V>(load_some<V>(data + at, rest));
      if constexpr (kSlopes) store_some<V>(data + at, e.slope, rest);
      sum.value += sum_lanes(V(first_lanes<V>(rest) ? e.value : V{}));
    }
    return sum;
  }

  const cpu::Projections& p_;
  T* data_;
};

}  // namespace
}  // namespace normnorm
