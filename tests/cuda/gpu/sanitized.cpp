// Runs the problems of a file through the launchers under compute-sanitizer, without torch. Inputs are copied from the host;
// outputs are not initialised, so that initcheck reports elements that are read before they are written. build.py writes the
// file: for each case its buffers, then a forward and a backward pass.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>
#include <vector>

#ifdef NN_ON_CPU
inline int cudaMalloc(void** p, size_t n) { return (*p = malloc(n)) ? 0 : 2; }
inline int cudaFree(void* p) { return free(p), 0; }
inline int copy(void* to, const void* from, size_t n) { return memcpy(to, from, n), 0; }
inline int cudaDeviceSynchronize() { return 0; }
#else
#include <cuda_runtime.h>
inline int copy(void* to, const void* from, size_t n) { return cudaMemcpy(to, from, n, cudaMemcpyDefault); }
#endif

extern "C" int launcher_workspace(const int64_t*, const double*, void* const*, int backward, size_t* bytes);
extern "C" int launcher_run(const int64_t*, const double*, void* const*, int backward, void* stream);

namespace {

void must(int error, const char* what) {
  if (error == 0) return;
  printf("%s: CUDA error %d\n", what, error);
  exit(1);
}

void* device_memory(size_t bytes) {
  void* p = nullptr;
  must(cudaMalloc(&p, bytes ? bytes : 1), "cudaMalloc");
  return p;
}

// Float32, float64, bfloat16, float16: the size, and the masks that make random bits a number of magnitude [0.5, 1).
constexpr size_t kBytes[] = {4, 8, 2, 2};
constexpr uint64_t kFree[] = {0x807fffff, 0x800fffffffffffff, 0x807f, 0x83ff};
constexpr uint64_t kFixed[] = {0x3f000000, 0x3fe0000000000000, 0x3f00, 0x3800};
constexpr uint64_t kExponent[] = {0x7f800000, 0x7ff0000000000000, 0x7f80, 0x7c00};

struct Buffer {
  int storage;
  size_t count;
  bool given;
  void* data;
};

void fill(const Buffer& b) {
  static uint64_t state = 20260105;
  std::vector<unsigned char> bytes(b.count * kBytes[b.storage]);
  for (size_t i = 0; i < b.count; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint64_t bits = ((state ^ state >> 31) & kFree[b.storage]) | kFixed[b.storage];
    memcpy(bytes.data() + i * kBytes[b.storage], &bits, kBytes[b.storage]);
  }
  must(copy(b.data, bytes.data(), bytes.size()), "copy to the device");
}

// The number of infinities and NaNs.
size_t bad(const Buffer& b) {
  std::vector<unsigned char> bytes(b.count * kBytes[b.storage]);
  must(copy(bytes.data(), b.data, bytes.size()), "copy to the host");
  size_t found = 0;
  for (size_t i = 0; i < b.count; ++i) {
    uint64_t bits = 0;
    memcpy(&bits, bytes.data() + i * kBytes[b.storage], kBytes[b.storage]);
    found += (bits & kExponent[b.storage]) == kExponent[b.storage];
  }
  return found;
}

template <class T>
std::vector<T> numbers(std::ifstream& file) {
  size_t count = 0;
  file >> count;
  std::vector<T> read(count);
  for (T& each : read) file >> each;
  return read;
}

// In the order of the pointers that launchers.cpp takes: the seed and the workspace.
constexpr size_t kSeed = 12, kWorkspace = 14;

void pass(std::ifstream& file, const std::vector<Buffer>& buffers, void* seed, int backward) {
  const auto whole = numbers<int64_t>(file);
  const auto reals = numbers<double>(file);
  const auto places = numbers<int>(file);
  std::vector<void*> pointers;
  for (int place : places) pointers.push_back(place < 0 ? nullptr : buffers[size_t(place)].data);
  pointers[kSeed] = seed;
  size_t bytes = 0;
  must(launcher_workspace(whole.data(), reals.data(), pointers.data(), backward, &bytes), "workspace");
  pointers[kWorkspace] = device_memory(bytes);
  must(launcher_run(whole.data(), reals.data(), pointers.data(), backward, nullptr), "launch");
  must(int(cudaDeviceSynchronize()), "kernel");
  must(int(cudaFree(pointers[kWorkspace])), "cudaFree");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) return printf("usage: %s PROBLEMS\n", argv[0]), 2;
  std::ifstream file(argv[1]);
  const int64_t number = 77;
  void* seed = device_memory(sizeof number);
  must(copy(seed, &number, sizeof number), "copy of the seed");
  size_t cases = 0, wrong = 0;
  for (std::string word; file >> word && word == "case"; ++cases) {
    size_t count = 0;
    file >> count;
    std::vector<Buffer> buffers(count);
    for (Buffer& b : buffers) {
      file >> b.storage >> b.count >> b.given;
      b.data = device_memory(b.count * kBytes[b.storage]);
      if (b.given) fill(b);
    }
    for (int backward : {0, 1}) pass(file, buffers, seed, backward);
    for (const Buffer& b : buffers) {
      if (const size_t n = bad(b)) printf("case %zu: %zu numbers of %zu are not finite\n", cases, n, b.count), ++wrong;
      must(int(cudaFree(b.data)), "cudaFree");
    }
  }
  must(int(cudaFree(seed)), "cudaFree");
  printf("%zu layers ran forward and backward\n", cases);
  return cases == 0 || wrong != 0;
}
