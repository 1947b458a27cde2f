// A CUDA runtime that checks launches instead of making them, linked with the objects that nvcc makes of csrc/cuda. The
// tests set the limits of the device and the resources of each kernel. The addresses of a pass are never read.
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "../../../csrc/cuda/columns_streaming.cuh"
#include "../../../csrc/cuda/launch.h"
#include "../pass.h"
#undef blockDim
#undef gridDim

using namespace normnorm;
using namespace normnorm::cuda;

namespace {

struct Model {
  int id, multiprocessors, block_shared;
  int shared, threads, blocks;  // of a multiprocessor
  int major, ptx;
};
struct Kernel {
  std::string symbol, family, threads_class;
  std::vector<bool> flags;  // of the template arguments
  int registers = 0, shared = 0, threads = 0, element = 4;
  long launches = 0;
};
struct Region {
  std::string name;
  uintptr_t begin, end;
};

Model model;
std::map<const void*, Kernel> kernels;
std::map<std::pair<int, const void*>, int> dynamic_limit;
std::vector<Region> regions;  // of the current pass
int launched;                 // by it
std::vector<std::string> problems;

void report(const Kernel& k, const std::string& what) { problems.push_back(k.symbol + ": " + what); }

// Blocks of a multiprocessor at the same time, computed as in the toolkit's cuda_occupancy.h.
int occupancy(const Kernel& k, int threads, size_t dynamic) {
  const int warps = threads / 32, warp_registers = (k.registers * 32 + 255) / 256 * 256;
  const int by_registers = 16384 / warp_registers * 4 / warps;
  const int by_shared = int(size_t(model.shared) / ((k.shared + dynamic + 1024 + 127) / 128 * 128));
  return std::min({by_registers, by_shared, model.threads / threads, model.blocks});
}
int active_clusters(const Kernel& k, int threads, size_t dynamic, int size) {
  int clusters = 0;  // each within 16 multiprocessors
  for (int left = model.multiprocessors; left > 0; left -= 16)
    clusters += std::min(left, 16) * occupancy(k, threads, dynamic) / size;
  return clusters;
}

// Checks the arguments of one launch.
class Look {
 public:
  Look(const Kernel& k, unsigned grid, unsigned threads, unsigned cluster, size_t dynamic)
      : k_(k), grid_(grid), threads_(threads), cluster_(cluster), dynamic_(dynamic) {}

  template <class T>
  void arguments(void** given) {
    using Real = RealOf<T>;
    const auto starts = [&](const char* with) { return k_.family.rfind(with, 0) == 0; };
    const bool aligned = k_.flags.size() > 1 && !k_.flags[1] && !starts("stream_finish") && !starts("column_finish");
    if (starts("rows_")) {
      const auto& a = *static_cast<const KernelArgs<Real>*>(given[0]);
      rows<T>(a, aligned, 0);
      const bool backward = starts("rows_backward"), elementwise = backward && k_.flags[2];
      unsigned blocks = cluster_;
      if (k_.threads_class == "GridThreads") {
        const auto& sync = *static_cast<const typename GridThreads<Real>::Sync*>(given[1]);
        blocks = sync_blocks(sync, grid_ / std::max(1u, sync.blocks) * 2 * kMaxSums * sync.blocks);
      }
      const int in_registers = !backward ? kForwardRegister<T> : elementwise ? kBackwardRegister<T, true> : kBackwardRegister<T>;
      holds<T>(a.chunks, blocks, in_registers, backward ? 3 : 1, elementwise ? 2 : 0);
      if (backward) parts(a, elementwise ? grid_ / blocks * a.length : a.affine == Affine::kPerGroup ? a.groups : 0);
    } else if (starts("stream_")) {
      const auto& s = *static_cast<const StreamingArgs<Real>*>(given[0]);
      const bool finish = starts("stream_finish"), leave = starts("stream_leave");
      const unsigned splits = finish || leave ? 1 : s.splits;
      rows<T>(s, aligned, 0);
      require(grid_ == s.groups * splits, "not as many blocks as there is work for");
      if (starts("stream_output")) return;
      workspace("parts", s.partial, grid_ / splits * size_t(s.splits) * kMaxSums);
      means(s.mean, grid_ / splits);
      workspace("sums", s.sums, grid_ / splits * kMaxSums);
      if (leave) round_sums(given[1], s.groups);
      if (finish && s.affine == Affine::kPerGroup) parts(s, s.groups);
    } else if (starts("column_")) {
      const auto& a = *static_cast<const ColumnsArgs<Real>*>(given[0]);
      rows<T>(a, aligned, a.columns);
      const int64_t outer = a.groups / a.inner.divisor;
      require(a.tiles * kTileColumns<T> >= a.columns, "columns beyond the tiles");
      const bool backward = starts("column_backward");
      if (backward || starts("column_forward")) {
        const auto& sync = *static_cast<const typename TileThreads<T>::Sync*>(given[1]);
        const unsigned blocks = sync_blocks(sync, size_t(grid_) * 2 * kMaxSums * kTileColumns<T>);
        holds<T>(a.runs * kTileChunks, blocks, backward ? kColumnBackwardRegister<T> : kForwardRegister<T>,
                 backward ? 3 : 1);
      } else {
        const bool leave = starts("column_leave"), finish = leave || starts("column_finish");
        require(grid_ == (finish ? a.groups : outer * a.tiles * a.splits), "not as many blocks as there is work for");
        if (a.partial || !starts("column_gradient"))  // the gradient of the input has no sums
          workspace("parts", a.partial, size_t(outer) * a.tiles * a.splits * kMaxSums * kTileColumns<T>);
        means(a.mean, a.groups);
        workspace("sums", a.sums, size_t(a.groups) * kMaxSums);
        if (leave) round_sums(given[1], a.groups);
      }
      if (backward || starts("column_finish")) parts(a, outer * a.columns);
    } else if (starts("take_means")) {
      const uint32_t groups = *static_cast<const uint32_t*>(given[1]);
      require(inside("round", *static_cast<const double* const*>(given[0]), size_t(groups) * 5 * sizeof(double)),
              "means beyond their memory");
      workspace("sums", *static_cast<Real* const*>(given[2]), size_t(groups) * kMaxSums);
      require(uint64_t(grid_) * threads_ >= groups, "groups without a thread");
    } else if (starts("run_parameters")) {
      const auto& a = *static_cast<const KernelArgs<Real>*>(given[0]);
      rows<T>(a, aligned, 0);
      require(uint64_t(grid_) * threads_ / 32 >= uint64_t(a.groups) * a.runs, "runs without a warp");
      parts(a, int64_t(a.groups) * a.runs);
    } else if (starts("element_parameters")) {
      const auto& a = *static_cast<const KernelArgs<Real>*>(given[0]);
      const uint32_t slabs = *static_cast<const uint32_t*>(given[1]);
      rows<T>(a, aligned, 0);
      require(grid_ % slabs == 0 && uint64_t(grid_ / slabs) * threads_ * kChunkOf<T> >= uint64_t(a.length),
              "elements without a thread");
      parts(a, int64_t(slabs) * a.length);
    } else if (starts("reduce_partials")) {
      const int64_t count = *static_cast<const int64_t*>(given[2]);
      workspace("parts", *static_cast<const Real* const*>(given[0]), *static_cast<const int64_t*>(given[1]) * count);
      const void* out = *static_cast<void* const*>(given[3]);
      const size_t bytes = size_t(count) * (*static_cast<const bool*>(given[4]) ? sizeof(T) : sizeof(Real));
      require(inside("grad_weight", out, bytes) || inside("grad_bias", out, bytes), "the gradient lies outside its memory");
      require(int64_t(grid_) * 32 >= count, "elements without a thread");
    } else {
      report(k_, "an unknown kernel");
    }
  }

 private:
  void require(bool holds, const std::string& what) const {
    if (!holds) report(k_, what + " [grid " + std::to_string(grid_) + "]");
  }
  static bool at_boundary(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }
  static bool inside(const std::string& name, const void* p, size_t bytes) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
    for (const Region& r : regions)
      if (r.name == name && begin >= r.begin && begin + bytes <= r.end) return true;
    return false;
  }
  // Requires memory within the workspace that overlaps with nothing else of this launch.
  template <class V>
  void workspace(const char* what, const V* p, size_t count) {
    const uintptr_t begin = reinterpret_cast<uintptr_t>(p), end = begin + count * sizeof(V);
    require(inside("workspace", p, count * sizeof(V)), std::string(what) + " beyond the workspace");
    for (const Region& r : claimed_) require(end <= r.begin || begin >= r.end, std::string(what) + " upon " + r.name);
    claimed_.push_back({what, begin, end});
  }

  // In the workspace, or in the statistics for a round alone.
  template <class Real>
  void means(const Real* p, size_t count) {
    if (!inside("stats", p, count * sizeof(Real))) workspace("means", p, count);
  }
  void round_sums(const void* given, size_t groups) const {
    const auto& to = *static_cast<const RoundSums*>(given);
    require(to.count > 0 && inside("round", to.sums, size_t(to.count) * groups * sizeof(double)), "sums beyond their memory");
  }

  template <class Sync>
  unsigned sync_blocks(const Sync& sync, size_t numbers) {
    require(sync.blocks > 0 && grid_ % std::max(1u, sync.blocks) == 0, "a thread group lacks blocks");
    workspace("counters", sync.counters, grid_ / std::max(1u, sync.blocks));
    workspace("partial sums", sync.partial, numbers);
    return std::max(1u, sync.blocks);
  }

  template <class T>
  void holds(int64_t chunks, unsigned blocks, int in_registers, int planes, int sums = 0) const {
    const int64_t each = ceil_div(chunks, int64_t(threads_) * blocks), kept = each > in_registers ? each - in_registers : 0;
    const size_t plane = kChunkOf<T> * sizeof(RealOf<T>) * threads_;
    require(size_t(kept * planes + each * sums) * plane <= dynamic_, "a group does not fit on chip");
  }

  template <class Real>
  void parts(const KernelArgs<Real>& a, int64_t count) {
    const auto one = [&](const char* gradient, const Real* p) {
      if (p && !inside(gradient, p, size_t(count) * sizeof(Real))) workspace(gradient, p, size_t(count));
    };
    one("grad_weight", a.weight_partials);
    one("grad_bias", a.bias_partials);
  }

  // columns: of an outer index in the columns layout, else 0.
  template <class T>
  void rows(const KernelArgs<RealOf<T>>& a, bool aligned, int64_t columns) const {
    constexpr int N = kChunkOf<T>;
    const int64_t outer = a.groups / a.inner.divisor, inner = columns ? 1 : a.inner.divisor;
    const int64_t length = columns ? columns : a.length;
    const auto multiple = [&](const Strides& s, int64_t of) {
      return (outer == 1 || s.outer % of == 0) && (inner == 1 || s.inner % of == 0) && (a.runs == 1 || s.run % of == 0);
    };
    const auto operand = [&](const char* name, const void* p, const Strides& s) {
      if (!p) return;
      const int64_t in_group = int64_t(a.runs - 1) * s.run + length;
      const size_t bytes = size_t((outer - 1) * s.outer + (inner - 1) * s.inner + in_group) * sizeof(T);
      const bool sum = p == a.fused.sum.data && inside("sum", p, bytes);  // the input of a later round
      require(sum || inside(name, p, bytes), std::string(name) + " beyond its memory");
      if (!aligned) return;
      require(at_boundary(p) && multiple(s, N), std::string(name) + " in chunks that are not aligned");
      require(columns || in_group / N < int64_t(1) << 32, std::string(name) + " longer than 32 bits count");
    };
    operand("input", a.input, a.at_input);
    operand("grad_output", a.grad, a.at_grad);
    operand("output", a.output, a.at_output);
    operand("residual", a.fused.residual.data, a.fused.residual.at);
    operand("addend", a.fused.addend.data, a.fused.addend.at);
    operand("sum", a.fused.sum.data, a.fused.sum.at);
    operand("activated", a.fused.activated.data, a.fused.activated.at);
    operand("grad_sum", a.fused.grad_sum.data, a.fused.grad_sum.at);
    const int64_t elements = a.affine == Affine::kPerElement ? length : a.affine == Affine::kPerColumn ? columns
                             : a.affine == Affine::kPerRun   ? int64_t(a.inner.divisor) * a.runs : a.inner.divisor;
    const auto parameter = [&](const char* name, const void* p, bool in_storage) {
      if (!p) return;
      const size_t bytes = size_t(elements) * (in_storage ? sizeof(T) : sizeof(RealOf<T>));
      require(inside(name, p, bytes), std::string(name) + " beyond its memory");
      require(!aligned || a.affine != Affine::kPerElement || at_boundary(p), std::string(name) + " is not aligned");
    };
    parameter("weight", a.weight, a.weight_in_storage);
    parameter("bias", a.bias, a.bias_in_storage);
    require(inside("stats", a.stats, size_t(kStatRows) * a.groups * sizeof(RealOf<T>)), "statistics beyond their memory");
    require(!a.noise || inside("seed", a.seed, 8), "noise without a seed");
    require(!aligned || length % N == 0, "runs of no whole chunks");
    require(!aligned || !a.noise || multiple(a.at_noise, N), "noise that begins within a chunk");
  }

  const Kernel& k_;
  unsigned grid_, threads_, cluster_;
  size_t dynamic_;
  std::vector<Region> claimed_;
};

}  // namespace

// --- the runtime -----------------------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle[1];
  return handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels[host].symbol = device;
}
// Called by nvcc's kernel stubs, which are not called here.
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, cudaStream_t) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

cudaError_t cudaGetDevice(int* id) {
  *id = model.id;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = model.multiprocessors; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = model.block_shared; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = model.shared; break;
    case cudaDevAttrComputeCapabilityMajor: *value = model.major; break;
    case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* facts, const void* entry) {
  const Kernel& k = kernels.at(entry);
  *facts = {};
  facts->sharedSizeBytes = size_t(k.shared), facts->numRegs = k.registers;
  facts->maxThreadsPerBlock = k.threads, facts->ptxVersion = model.ptx;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void* entry, cudaFuncAttribute attribute, int value) {
  const Kernel& k = kernels.at(entry);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value < 0 || k.shared + value > model.block_shared) {
    report(k, "an attribute that the device refuses");
    return cudaErrorInvalidValue;
  }
  dynamic_limit[{model.id, entry}] = value;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* p, int, size_t bytes, cudaStream_t) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p);
  for (const Region& r : regions)
    if (r.name == "workspace" && bytes > 0 && begin >= r.begin && begin + bytes <= r.end) return cudaSuccess;
  problems.push_back("cudaMemsetAsync beyond the workspace");
  return cudaSuccess;
}
// A plan assumes two blocks a multiprocessor where blocks wait for one another.
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void* entry, int threads, size_t dynamic) {
  *blocks = occupancy(kernels.at(entry), threads, dynamic);
  const bool waits = kernels.at(entry).threads_class == "GridThreads";
  if (waits && *blocks < kBlocksPerMultiprocessor) report(kernels.at(entry), "two blocks do not share a multiprocessor");
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void* entry, const cudaLaunchConfig_t* c) {
  const Kernel& k = kernels.at(entry);
  *clusters = active_clusters(k, int(c->blockDim.x), c->dynamicSmemBytes, int(c->attrs[0].val.clusterDim.x));
  if (c->dynamicSmemBytes > 0 && occupancy(k, int(c->blockDim.x), c->dynamicSmemBytes) < kBlocksPerMultiprocessor)
    report(k, "two blocks do not share a multiprocessor");
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* entry, void** arguments) {
  Kernel& k = kernels.at(entry);
  ++k.launches, ++launched;
  unsigned grid = c->gridDim.x, threads = c->blockDim.x, cluster = 1;
  size_t dynamic = c->dynamicSmemBytes;
  bool cooperative = false;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = c->attrs[i].val.cooperative != 0;
    else if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = c->attrs[i].val.clusterDim.x;
    else report(k, "an unknown attribute");
  }
  const auto require = [&](bool holds, const std::string& what) {
    std::ostringstream s;
    s << what << " [grid " << grid << ", threads " << threads << ", shared " << k.shared << " + " << dynamic << ", cluster "
      << cluster << ", registers " << k.registers << "]";
    if (!holds) report(k, s.str());
  };
  require(k.registers > 0, "the kernel's resources are not set");
  require(grid > 0 && grid <= 0x7fffffffu, "the grid's size");
  require(c->gridDim.y * c->gridDim.z * c->blockDim.y * c->blockDim.z == 1, "more than one dimension");
  require(threads > 0 && threads % 32 == 0 && int(threads) <= k.threads, "more threads than the bound, or no whole warps");
  const auto limit = dynamic_limit.find({model.id, entry});
  const int allowed = limit == dynamic_limit.end() ? 49152 - k.shared : limit->second;
  require(dynamic <= size_t(allowed), "more shared memory than allowed");
  require(threads >= 32 && occupancy(k, int(threads), dynamic) > 0, "a block does not fit a multiprocessor");
  if (grid == 0 || threads % 32) return cudaErrorInvalidConfiguration;
  if (cluster > 1) {
    require(model.major >= 9 && model.ptx >= 90, "a cluster on a device or of code without");
    require(cluster <= 8 && grid % cluster == 0, "the cluster's size");
    require(active_clusters(k, int(threads), dynamic, int(cluster)) > 0, "a cluster does not fit the device");
  }
  require(!cooperative || uint64_t(occupancy(k, int(threads), dynamic)) * model.multiprocessors >= grid,
          "the blocks of a cooperative launch do not fit the device");
  require(cooperative == (k.threads_class == "GridThreads"), "blocks that wait for one another, not all launched at once");
  Look look(k, grid, threads, cluster, dynamic);
  if (k.element == 8) look.arguments<double>(arguments);
  else if (k.element == 4) look.arguments<float>(arguments);
  else look.arguments<__half>(arguments);
  return cudaSuccess;
}

}  // extern "C"

// --- called by the tests ---------------------------------------------------------------------------

extern "C" {

int kernel_count() { return int(kernels.size()); }
const char* kernel_symbol(int i) { return std::next(kernels.begin(), i)->second.symbol.c_str(); }
long kernel_launches(int i) { return std::next(kernels.begin(), i)->second.launches; }
// name: family<type, flags...>
void set_kernel(int i, const char* name, int registers, int shared, int threads) {
  Kernel& k = std::next(kernels.begin(), i)->second;
  k.family.clear(), k.threads_class.clear(), k.flags.clear();
  std::istringstream words(name);
  std::getline(words, k.family, '<');
  for (std::string word; std::getline(words, word, ',');) {
    k.flags.push_back(word.find("true") != std::string::npos);
    if (k.flags.size() == 1) k.element = word[0] == 'd' ? 8 : word[0] == 'f' ? 4 : 2;
    if (word.find("Threads<") != std::string::npos) k.threads_class = word.substr(1, word.find('<') - 1);
  }
  if (k.family == "column_forward" || k.family == "column_backward") k.threads_class = "GridThreads";
  k.registers = registers, k.shared = shared, k.threads = threads;
}
void set_model(const Model* m) { model = *m; }
// The oldest problem not yet returned, or null.
const char* problem() {
  static std::string text;
  if (problems.empty()) return nullptr;
  text = problems.front();
  problems.erase(problems.begin());
  return text.c_str();
}

// A CUDA error, 0, or -1 where the binding would raise an error or launch none of these kernels.
int run_pass(const Pass* pass) {
  regions.clear();
  launched = 0;
  uintptr_t next = uintptr_t(1) << 40;
  const auto memory = [&](const char* name, int64_t count, Storage storage, int64_t offset) {
    const int64_t size = storage == Storage::kFloat64 ? 8 : storage == Storage::kFloat32 ? 4 : 2;
    const uintptr_t begin = next + uintptr_t(offset * size), end = begin + uintptr_t(count * size);
    next = (end + 4095) / 512 * 512;
    regions.push_back({name, begin, end});
    return reinterpret_cast<void*>(begin);
  };
  cuda::Problem p;
  if (!make_problem(*pass, memory, p)) return -1;
  size_t bytes = 0;
  const int e = normnorm_cuda_workspace(&p, pass->backward, &bytes);
  if (bytes > 0) p.workspace = memory("workspace", int64_t(bytes + 7) / 8, Storage::kFloat64, 0);
  if (e) return e;
  if (pass->backward) return normnorm_cuda_backward(&p, nullptr);
  const int error = normnorm_cuda_forward(&p, nullptr);
  if (pass->frozen && !pass->noise && launched > 1) problems.push_back("an evaluation of several launches");
  return error;
}

}  // extern "C"
