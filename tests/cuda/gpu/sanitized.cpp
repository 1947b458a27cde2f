// Small layers in every tier, forward and backward, and round by round, under compute-sanitizer: without torch. Inputs are copied from the
// host; outputs are not initialised, so that initcheck reports elements that are read before they are written.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
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
  Kind kind;
  int64_t num_groups, normalized_ndim, dim, sizes[5];
};
struct Forced {
  cuda::Tier tier;
  int threads, blocks, thread_groups;
};
// As in tests/cuda/tiers.py.
const Layer kRows[] = {{Kind::kLayer, 0, 1, 2, {5, 2400}}, {Kind::kLayer, 0, 1, 2, {5, 37}},
                       {Kind::kBatch, 0, 0, 4, {7, 3, 7, 7}}, {Kind::kGroup, 2, 0, 4, {3, 6, 5, 5}}};
const Layer kColumns[] = {{Kind::kBatch, 0, 0, 4, {6, 5, 5, 5}}, {Kind::kInstance, 0, 0, 4, {3, 8, 6, 6}},
                          {Kind::kGroup, 4, 0, 4, {3, 12, 5, 5}}};
const Forced kRowTiers[] = {{cuda::Tier::kBlock, 0, 0, 2}, {cuda::Tier::kBlock, 32, 0, 2}, {cuda::Tier::kCluster, 32, 2, 2},
                            {cuda::Tier::kGrid, 64, 3, 2}, {cuda::Tier::kStreaming, 0, 2, 3}};
const Forced kColumnTiers[] = {{cuda::Tier::kGrid, 0, 1, 2}, {cuda::Tier::kGrid, 0, 2, 2}, {cuda::Tier::kStreaming, 0, 2, 0}};

void must(int error, const char* what) {
  if (error == 0) return;
  printf("%s: CUDA error %d\n", what, error);
  exit(1);
}

// Memory of float64, float32 or bfloat16, which is the upper half of a float32, or of a seed of 8 bytes.
struct Buffer {
  std::string name;
  size_t halves_each, bytes;  // halves of 2 bytes a number
  bool half;
  void* data;

  Buffer(const std::string& name, size_t count, Storage storage)
      : name(name), halves_each(storage == Storage::kFloat64 ? 4 : storage == Storage::kFloat32 ? 2 : 1),
        bytes(count * halves_each * 2), half(storage == Storage::kBFloat16) {
    must(cudaMalloc(&data, bytes), "cudaMalloc");
  }
  // Numbers of magnitude [0.5, 1), of float64 smaller ones.
  void fill() {
    static std::mt19937 random(20260105);
    std::vector<uint16_t> halves(bytes / 2);
    for (size_t i = 0; i < halves.size(); ++i)
      halves[i] = half || i % 2 ? uint16_t((random() & 0x807f) | 0x3f00) : uint16_t(random());
    must(copy(data, halves.data(), bytes), "copy to the device");
  }
  // The number of infinities and NaNs.
  size_t bad() const {
    std::vector<uint16_t> halves(bytes / 2);
    must(copy(halves.data(), data, bytes), "copy to the host");
    const int exponent = halves_each == 4 ? 0x7ff0 : 0x7f80;
    size_t found = 0;
    for (size_t i = halves_each - 1; i < halves.size(); i += halves_each) found += (halves[i] & exponent) == exponent;
    return found;
  }
};

// Whether all results of a pass are finite.
bool run(const Pass& pass) {
  std::vector<Buffer> read, written;
  const auto memory = [&](const std::string& name, int64_t count, Storage storage, int64_t) {
    const bool result = name == "output" || name == "sum" || name.rfind("grad_w", 0) == 0 || name == "grad_bias" ||
                        (name == "stats" && !pass.backward && !pass.round) ||
                        (name == "round" && pass.round != int(Round::kGradient));
    Buffer& b = (result ? written : read).emplace_back(name, size_t(count), storage);
    if (!result) b.fill();
    return b.data;
  };
  cuda::Problem p;
  if (!make_problem(pass, memory, p)) return printf("there is no such pass\n"), false;
  size_t bytes = 0;
  must(normnorm_cuda_workspace(&p, pass.backward, &bytes), "workspace");
  must(cudaMalloc(&p.workspace, bytes + 1), "cudaMalloc");
  must(pass.backward ? normnorm_cuda_backward(&p, nullptr) : normnorm_cuda_forward(&p, nullptr), "launch");
  must(int(cudaDeviceSynchronize()), "kernel");
  must(int(cudaFree(p.workspace)), "cudaFree");
  bool right = true;
  for (const Buffer& b : written)
    if (const size_t n = b.bad()) right = false, printf("%zu of %s are not finite\n", n, b.name.c_str());
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
  const bool in_rounds = layer.kind == Kind::kBatch && f.tier == cuda::Tier::kStreaming;
  for (Storage storage : {Storage::kFloat32, Storage::kBFloat16})
    for (int number = -1; number <= (in_rounds ? int(Round::kGradient) : 0); ++number) {
      const int round = number < 0 ? 0 : number;  // both passes, then each round
      const bool backward = round ? is_backward(Round(round)) : number == 0;
      Pass pass = {int32_t(layer.kind), layer.num_groups, layer.normalized_ndim, layer.dim};
      memcpy(pass.sizes, layer.sizes, sizeof pass.sizes);
      pass.input = pass.grad_output = pass.output = pass.beside = dense(layer, columns);
      pass.storage = int(storage), pass.parameters = 1;
      pass.backward = backward, pass.channels_last = columns;
      pass.noise = pass.relu = pass.needs_input = pass.needs_weight = pass.needs_bias = 1;
      pass.round = round;
      pass.add = storage == Storage::kFloat32 && !round, pass.residual = !pass.add;
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
      if (layer.kind != Kind::kGroup || f.tier == cuda::Tier::kStreaming) run_all(layer, true, f);  // always streamed
  printf("%d passes ran, %d wrong\n", passes, wrong);
  return wrong != 0;
}
