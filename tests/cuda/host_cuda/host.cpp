// Settings of the emulator and functions of the kernels that only the run on the CPU has, for ctypes.
#include <algorithm>
#include <utility>

#include "../../../csrc/binding/cuda_device.h"
#include "../../../csrc/cuda/columns.cuh"
#include "../../../csrc/cuda/rows_launch.cuh"

using namespace normnorm;
using namespace normnorm::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

const char* normnorm::cuda_error_text(int) { return "an error of the host run"; }

namespace {

// The address of chunk `chunk` of a run: (bytes from the input's start, counter of the noise).
template <class T>
std::pair<int64_t, uint64_t> offsets(const Problem& p, uint32_t group, uint32_t run, uint32_t chunk) {
  constexpr int N = kChunkOf<T>;
  const auto bytes = [&](const T* at) { return reinterpret_cast<const char*>(at) - static_cast<const char*>(p.input.data); };
  if (p.geometry.columns) {
    const uint32_t columns = uint32_t(p.geometry.inner * p.geometry.length);
    ColumnPlace c = {};
    c.outer = group / columns, c.column = group % columns;
    const int64_t noise = row_position(p.noise.position, c, run) + c.column;
    return {bytes(row_address<T>(p.input.data, p.input.stride, c, run)), uint64_t(noise) / 4};
  }
  const ChunkMode mode = chunk_mode<T>(p, false);
  const KernelArgs<RealOf<T>> a = kernel_args<T>(p, mode);
  const GroupPlace g = locate_group(a, group);
  const uint32_t number = run * a.chunks_per_run.divisor + chunk;
  if (mode.ragged) {
    const ChunkPlace c = locate_chunk<true, N>(a, g, number);
    return {bytes(chunk_address<T, true>(p.input.data, g.input, a.at_input, c)), chunk_quad<N, true>(a, g, c)};
  }
  const ChunkPlace c = locate_chunk<false, N>(a, g, number);
  return {bytes(chunk_address<T, false>(p.input.data, g.input, a.at_input, c)), chunk_quad<N, false>(a, g, c)};
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

// The blocks of each launch since the last call, up to `most` of them; returns their number.
EXPORT int host_grids(unsigned* blocks, int most) {
  const std::vector<unsigned> grids = std::exchange(host_cuda::settings().grids, {});
  std::copy_n(grids.begin(), std::min<size_t>(grids.size(), size_t(most)), blocks);
  return int(grids.size());
}

// numbers: storage, geometry (5), the strides of the noise (3) and of the input (3), group, run, chunk. Returns the counter
// of the noise.
EXPORT uint64_t host_offsets(const int64_t* n, int64_t* bytes) {
  Problem p;
  p.storage = Storage(n[0]);
  p.geometry = {n[1] != 0, n[2], n[3], n[4], n[5]};
  p.noise.on = true;
  p.noise.position = {n[6], n[7], n[8]};
  p.input = p.output = {reinterpret_cast<void*>(uintptr_t(1) << 40), {n[9], n[10], n[11]}};
  const auto find = p.storage == Storage::kFloat64 ? offsets<double>
                    : p.storage == Storage::kBFloat16 ? offsets<__nv_bfloat16> : offsets<float>;
  const auto [at, counter] = find(p, uint32_t(n[12]), uint32_t(n[13]), uint32_t(n[14]));
  *bytes = at;
  return counter;
}
