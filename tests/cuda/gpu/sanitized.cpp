// Small layers in every tier, forward and backward, under compute-sanitizer: without torch. Inputs are copied from the
// host; outputs are not initialised, so that initcheck reports elements that are read before they are written.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "../pass.h"

#ifdef NN_ON_CPU
inline int cudaMalloc(void** p, size_t n) { return (*p = malloc(n)) ? 0 : 2; }
inline int cudaFree(void* p) { return free(p), 0; }
inline int copy(void* to, const void* from, size_t n) { return memcpy(to, from, n), 0; }
inline int cudaDeviceSynchronize() { return 0; }
#else
#include <cuda_runtime.h>
inline int copy(void* to, const void* from, size_t n) { return cudaMemcpy(to, from, n, cudaMemcpyDefault); }
#endif

using namespace normnorm;

namespace {

struct Layer {
  const char* kind;
  int64_t num_groups, normalized_ndim, dim, sizes[5];
};
struct Forced {
  cuda::Tier tier;
  int threads, blocks, thread_groups;
};
// As in tests/cuda/tiers.py.
const Layer kRows[] = {{"layer", 0, 1, 2, {5, 2400}}, {"layer", 0, 1, 2, {5, 37}},
                       {"batch", 0, 0, 4, {7, 3, 7, 7}}, {"group", 2, 0, 4, {3, 6, 5, 5}}};
const Layer kColumns[] = {{"batch", 0, 0, 4, {6, 5, 5, 5}}, {"instance", 0, 0, 4, {3, 8, 6, 6}},
                          {"group", 4, 0, 4, {3, 12, 5, 5}}};
const Forced kRowTiers[] = {{cuda::Tier::kBlock, 0, 0, 2}, {cuda::Tier::kBlock, 32, 0, 2}, {cuda::Tier::kCluster, 32, 2, 2},
                            {cuda::Tier::kGrid, 64, 3, 2}, {cuda::Tier::kStreaming, 0, 2, 3}};
const Forced kColumnTiers[] = {{cuda::Tier::kGrid, 0, 1, 2}, {cuda::Tier::kGrid, 0, 2, 2}, {cuda::Tier::kStreaming, 0, 2, 0}};

// Float32, float64, bfloat16, float16: the size, and the masks that make random bits a number of magnitude [0.5, 1).
constexpr size_t kBytes[] = {4, 8, 2, 2};
constexpr uint64_t kFree[] = {0x807fffff, 0x800fffffffffffff, 0x807f, 0x83ff};
constexpr uint64_t kFixed[] = {0x3f000000, 0x3fe0000000000000, 0x3f00, 0x3800};
constexpr uint64_t kExponent[] = {0x7f800000, 0x7ff0000000000000, 0x7f80, 0x7c00};

void must(int error, const char* what) {
  if (error == 0) return;
  printf("%s: CUDA error %d\n", what, error);
  exit(1);
}

struct Buffer {
  std::string name;
  size_t count;
  int storage;
  void* data;

  Buffer(const char* name, size_t count, Storage storage) : name(name), count(count), storage(int(storage)) {
    must(cudaMalloc(&data, count * size()), "cudaMalloc");
  }
  size_t size() const { return kBytes[storage]; }

  void fill() {
    static uint64_t state = 20260105;
    std::vector<unsigned char> bytes(count * size());
    for (size_t i = 0; i < count; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      const uint64_t bits = ((state ^ state >> 31) & kFree[storage]) | kFixed[storage];
      memcpy(bytes.data() + i * size(), &bits, size());
    }
    must(copy(data, bytes.data(), bytes.size()), "copy to the device");
  }
  // The number of infinities and NaNs.
  size_t bad() const {
    std::vector<unsigned char> bytes(count * size());
    must(copy(bytes.data(), data, bytes.size()), "copy to the host");
    size_t found = 0;
    for (size_t i = 0; i < count; ++i) {
      uint64_t bits = 0;
      memcpy(&bits, bytes.data() + i * size(), size());
      found += (bits & kExponent[storage]) == kExponent[storage];
    }
    return found;
  }
};

// Whether all results of a pass are finite.
bool run(const Pass& pass) {
  std::vector<Buffer> read, written;
  const auto memory = [&](const std::string& name, int64_t count, Storage storage, int64_t) {
    const bool result = name == "output" || name == "sum" || name.rfind("grad_w", 0) == 0 || name == "grad_bias" ||
                        (name == "stats" && !pass.backward);
    Buffer& b = (result ? written : read).emplace_back(name.c_str(), size_t(count), storage);
    if (!result) b.fill();
    return b.data;
  };
  cuda::Problem p;
  if (!make_problem(pass, memory, p)) return printf("%s: there is no such pass\n", pass.kind), false;
  size_t bytes = 0;
  must(normnorm_cuda_workspace(&p, pass.backward, &bytes), "workspace");
  must(cudaMalloc(&p.workspace, bytes + 1), "cudaMalloc");
  must(pass.backward ? normnorm_cuda_backward(&p, nullptr) : normnorm_cuda_forward(&p, nullptr), "launch");
  must(int(cudaDeviceSynchronize()), "kernel");
  must(int(cudaFree(p.workspace)), "cudaFree");
  bool right = true;
  for (const Buffer& b : written)
    if (const size_t n = b.bad()) right = false, printf("%s: %zu of %zu of %s are not finite\n", pass.kind, n, b.count, b.name.c_str());
  for (const auto* buffers : {&read, &written})
    for (const Buffer& b : *buffers) must(int(cudaFree(b.data)), "cudaFree");
  return right;
}

Tensor dense(const Layer& layer, bool columns) {
  Tensor t = {};
  int64_t step = columns ? layer.sizes[1] : 1;
  for (int64_t i = layer.dim - 1; i >= 0; --i) {
    if (columns && i == 1) continue;
    t.strides[i] = step;
    step *= layer.sizes[i];
  }
  if (columns) t.strides[1] = 1;
  return t;
}

int passes = 0, wrong = 0;

void run_all(const Layer& layer, bool columns, const Forced& f) {
  normnorm_cuda_force(int(f.tier), f.threads, f.blocks, f.thread_groups);
  for (Storage storage : {Storage::kFloat32, Storage::kBFloat16})
    for (int backward : {0, 1}) {
      Pass pass = {layer.kind, layer.num_groups, layer.normalized_ndim, layer.dim};
      memcpy(pass.sizes, layer.sizes, sizeof pass.sizes);
      pass.input = pass.grad_output = pass.output = pass.beside = dense(layer, columns);
      pass.storage = int(storage), pass.parameters = 1;
      pass.backward = backward, pass.channels_last = columns;
      pass.noise = pass.relu = pass.needs_input = pass.needs_weight = pass.needs_bias = 1;
      pass.add = storage == Storage::kFloat32, pass.residual = !pass.add;
      ++passes;
      wrong += !run(pass);
    }
}

}  // namespace

int main() {
  for (const Layer& layer : kRows)
    for (const Forced& f : kRowTiers) run_all(layer, false, f);
  for (const Layer& layer : kColumns)
    for (const Forced& f : kColumnTiers)
      if (strcmp(layer.kind, "group") || f.tier == cuda::Tier::kStreaming) run_all(layer, true, f);  // always streamed
  printf("%d passes ran, %d wrong\n", passes, wrong);
  return wrong != 0;
}
