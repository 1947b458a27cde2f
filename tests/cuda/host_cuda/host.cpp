// Settings of the emulator and functions of the kernels that only the run on the CPU has, for ctypes.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <utility>

#include "../../../csrc/binding/cuda_device.h"
#include "../../../csrc/cuda/columns.cuh"
#include "../../../csrc/cuda/rows_launch.cuh"

using namespace normnorm;
using namespace normnorm::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

const char* normnorm::cuda_error_text(int) { return "an error of the host run"; }

namespace {

// The address of chunk `chunk` of a run: (bytes from the input's start, its number in the order of the noise).
template <class T>
std::pair<int64_t, uint64_t> offsets(const Problem& p, uint32_t group, uint32_t run, uint32_t chunk) {
  constexpr int N = kChunkOf<T>;
  const auto bytes = [&](const T* at) { return reinterpret_cast<const char*>(at) - static_cast<const char*>(p.input.data); };
  if (p.geometry.columns) {
    const uint32_t columns = uint32_t(p.geometry.inner * p.geometry.length);
    ColumnPlace c = {};
    c.outer = group / columns, c.column = group % columns;
    const int64_t noise = row_position(p.noise.position, c, run) + c.column;
    return {bytes(row_address<T>(p.input.data, p.input.stride, c, run)), uint64_t(noise) / N};
  }
  const ChunkMode mode = chunk_mode<T>(p, false);
  const KernelArgs<RealOf<T>> a = kernel_args<T>(p, mode);
  const GroupPlace g = locate_group(a, group);
  const uint32_t number = run * a.chunks_per_run.divisor + chunk;
  if (mode.ragged) {
    const ChunkPlace c = locate_chunk<true, N>(a, g, number);
    return {bytes(chunk_address<T, true>(p.input.data, g.input, a.at_input, c)), noise_chunk<N, true>(a, g, c)};
  }
  const ChunkPlace c = locate_chunk<false, N>(a, g, number);
  return {bytes(chunk_address<T, false>(p.input.data, g.input, a.at_input, c)), noise_chunk<N, false>(a, g, c)};
}

}  // namespace

// The device that plans are made for. co_resident: blocks that it is said to run at the same time.
EXPORT void host_device(int multiprocessors, int shared_bytes, int clusters, int cooperative, int co_resident,
                        int refuse_cooperative) {
  auto& s = host_cuda::settings();
  s.device = {multiprocessors, shared_bytes, clusters != 0, cooperative != 0};
  s.co_resident = co_resident;
  s.refuse_cooperative = refuse_cooperative != 0;
}

// The order of a block's threads, whether barrier sites are recorded, and the site to leave out.
EXPORT void host_configure(int order, int watch, const char* skip) {
  auto& s = host_cuda::settings();
  s.order = order;
  s.watch = watch != 0;
  s.skip = skip;
  if (watch && s.skip.empty()) s.sites.clear();
}

// The recorded barrier sites, each followed by a space.
EXPORT const char* host_sites() {
  static std::string all;
  all.clear();
  for (const std::string& site : host_cuda::settings().sites) all += site + " ";
  return all.c_str();
}

// Three numbers of each launch since the last call, as in Settings, up to `most` launches; returns how many there were.
EXPORT int host_launches(int* numbers, size_t most) {
  const auto launches = std::exchange(host_cuda::settings().launches, {});
  for (size_t i = 0; i < launches.size() && i < most; ++i) std::copy_n(launches[i].data(), 3, numbers + 3 * i);
  return int(launches.size());
}

// refusal() of a geometry; empty where it is served.
EXPORT const char* host_refusal(const int64_t* n) {
  static std::string sentence;
  sentence = refusal({n[0] != 0, n[1], n[2], n[3], n[4]});
  return sentence.c_str();
}

// What the binding calls here in place of aoti_torch_empty_strided: the memory holds NaN, of whatever type, so that an
// element that is read before it is written shows in the results.
extern "C" AOTITorchError host_cuda_empty_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                                  int32_t device_type, int32_t device_index, AtenTensorHandle* made) {
  const AOTITorchError e = aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type, device_index, made);
  void* data = nullptr;
  int64_t bytes = 0;
  if (e || aoti_torch_get_data_ptr(*made, &data) || aoti_torch_get_storage_size(*made, &bytes)) return e;
  if (bytes > 0) memset(data, 0xff, size_t(bytes));
  return e;
}

// numbers: storage, geometry (5), the strides of the noise (3) and of the input (3), group, run, chunk. Returns the
// chunk's number in the order of the noise.
EXPORT uint64_t host_offsets(const int64_t* n, int64_t* bytes) {
  Problem p;
  p.storage = Storage(n[0]);
  p.geometry = {n[1] != 0, n[2], n[3], n[4], n[5]};
  p.noise.on = true;
  p.noise.position = {n[6], n[7], n[8]};
  p.input = p.output = {reinterpret_cast<void*>(uintptr_t(1) << 40), {n[9], n[10], n[11]}};
  const auto find = p.storage == Storage::kFloat64 ? offsets<double>
                    : p.storage == Storage::kBFloat16 ? offsets<__nv_bfloat16> : offsets<float>;
  const auto [at, noise] = find(p, uint32_t(n[12]), uint32_t(n[13]), uint32_t(n[14]));
  *bytes = at;
  return noise;
}
