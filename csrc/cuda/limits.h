// What the kernels' 32-bit counters cannot count. Offsets in memory have 64 bits everywhere.
#pragma once

#include <string>

#include "problem.h"

namespace normnorm {
namespace cuda {

// Empty, or the sentence that says what of a geometry is too large.
inline std::string refusal(const Geometry& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  const auto too_many = [](int64_t n, const char* of) {
    return "got " + std::to_string(n) + " " + of + ", wanted at most 2147483647";
  };
  if (g.groups() > kMost) return too_many(g.groups(), "groups");
  if (g.columns) {
    if (g.outer * g.inner * g.length > kMost) return too_many(g.outer * g.inner * g.length, "columns");
    // a thread looks four of a launch's strides ahead
    if (g.runs > kMost / 2) return "got " + std::to_string(g.runs) + " rows, wanted at most 1073741823";
    return "";
  }
  // of four elements at least, and one more a run where runs begin anywhere
  const int64_t per_run = g.length / 4 + 2;
  if (per_run > kMost / g.runs) return too_many(per_run * g.runs, "chunks of four elements in a group");
  if (g.groups() > kMost / g.runs) return too_many(g.groups() * g.runs, "runs");
  return "";
}

}  // namespace cuda
}  // namespace normnorm
