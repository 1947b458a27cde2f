// Chooses the instruction set, once per process.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "params.h"

namespace normnorm {
namespace cpu {
namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;  // null where this build lacks it
  bool runs;
};

// The fastest first.
struct Candidates {
  Candidate list[3];
  int count = 0;
};

Candidates candidates() {
  Candidates c;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  c.list[c.count++] = {"avx512", avx512_kernels(), avx512};
  c.list[c.count++] = {"avx2", avx2_kernels(), avx2};
#endif
  c.list[c.count++] = {"generic", generic_kernels(), true};
  return c;
}

const Kernels& chosen() {
  const Candidates c = candidates();
  const char* wanted = std::getenv("NORMNORM_CPU_ISA");
  std::string usable;
  for (int i = 0; i < c.count; ++i) {
    if (!c.list[i].kernels || !c.list[i].runs) continue;
    if (!wanted || !*wanted || !std::strcmp(wanted, c.list[i].name)) return *c.list[i].kernels;
    usable += (usable.empty() ? "" : ", ") + std::string(c.list[i].name);
  }
  throw std::invalid_argument(
      "NORMNORM_CPU_ISA must name an instruction set that this machine and this build have (" + usable +
      "); got '" + wanted + "'");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = chosen();
  return table;
}

#if !defined(__x86_64__)
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif

}  // namespace cpu
}  // namespace normnorm
