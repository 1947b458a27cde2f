// The launchers for Python: tests fill a problem with addresses of CPU tensors and run the kernels on the CPU.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <utility>

#include "../../../csrc/cuda/columns.cuh"
#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/rows_launch.cuh"
#include "engine.h"
#include "faulty.h"

namespace py = pybind11;
using namespace normnorm;
using namespace normnorm::cuda;

namespace {

Strides strides(const py::tuple& t) { return {t[0].cast<int64_t>(), t[1].cast<int64_t>(), t[2].cast<int64_t>()}; }
Operand operand(const py::tuple& t) { return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), strides(t[1])}; }
Parameter parameter(const py::tuple& t) {
  return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()), t[1].cast<bool>()};
}

Problem problem_of(const py::dict& d) {
  Problem p;
  p.storage = Storage(d["storage"].cast<int>());
  const auto g = d["geometry"].cast<std::vector<int64_t>>();
  p.geometry = {g[0] != 0, g[1], g[2], g[3], g[4]};
  p.affine = Affine(d["affine"].cast<int>());
  p.noise.on = d["noise"].cast<bool>();
  p.noise.given_scale = d["given_scale"].cast<bool>();
  p.seed = reinterpret_cast<const int64_t*>(d["seed"].cast<uintptr_t>());
  p.noise.train = d["noise_train"].cast<double>();
  p.noise.stream = d["stream"].cast<uint32_t>();
  p.noise.position = strides(d["position"]);
  p.eps = d["eps"].cast<double>();
  p.alpha = d["alpha"].cast<double>();
  p.transform_eps = d["transform_eps"].cast<double>();
  p.order = d["order"].cast<int>();
  p.frozen = d["frozen"].cast<bool>();
  p.stats = reinterpret_cast<void*>(d["stats"].cast<uintptr_t>());
  p.weight = parameter(d["weight"]);
  p.bias = parameter(d["bias"]);
  p.input = operand(d["input"]);
  p.output = operand(d["output"]);
  p.grad_output = operand(d["grad_output"]);
  p.residual = operand(d["residual"]);
  p.relu = d["relu"].cast<bool>();
  p.activated = operand(d["activated"]);
  p.addend = operand(d["addend"]);
  p.sum = operand(d["sum"]);
  p.grad_sum = operand(d["grad_sum"]);
  p.grad_weight = parameter(d["grad_weight"]);
  p.grad_bias = parameter(d["grad_bias"]);
  p.force.tier = Tier(d["tier"].cast<int>());
  p.force.threads = d["threads"].cast<int>();
  p.force.blocks = d["blocks"].cast<int>();
  p.force.thread_groups = d["thread_groups"].cast<int>();
  return p;
}

// Runs a pass, in a workspace of the size that the launcher asks for, filled with NaN.
void run(const py::dict& d, bool backward) {
  Problem p = problem_of(d);
  size_t bytes = 0;
  int e = normnorm_cuda_workspace(&p, backward, &bytes);
  std::vector<char> workspace(bytes + 16, char(0xff));
  p.workspace = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(workspace.data()) + 15) / 16 * 16);
  py::gil_scoped_release release;
  if (e == 0) e = backward ? normnorm_cuda_backward(&p, nullptr) : normnorm_cuda_forward(&p, nullptr);
  if (e != 0) throw std::runtime_error("CUDA error " + std::to_string(e));
}

}  // namespace

// running: {name: (address, storage, stride)} and numbers of RunningStatistics.
void running(const py::dict& d, bool fold) {
  const auto buffer = [&](const char* name) {
    const auto t = d[name].cast<py::tuple>();
    return Buffer{reinterpret_cast<void*>(t[0].cast<uintptr_t>()), Storage(t[1].cast<int>()), t[2].cast<int64_t>()};
  };
  RunningStatistics r;
  r.mean = buffer("mean"), r.var = buffer("var"), r.lmbda = buffer("lmbda");
  r.channels = d["channels"].cast<int64_t>();
  r.eps = d["eps"].cast<double>();
  r.double_stats = d["double_stats"].cast<bool>();
  r.stats = reinterpret_cast<void*>(d["stats"].cast<uintptr_t>());
  r.groups = r.row_stride = d["groups"].cast<int64_t>();
  r.tracked = reinterpret_cast<int64_t*>(d["tracked"].cast<uintptr_t>());
  r.cumulative = d["momentum"].is_none();
  r.momentum = r.cumulative ? 0 : d["momentum"].cast<double>();
  r.count = d["count"].cast<double>();
  const int e = fold ? normnorm_cuda_fold_running(&r, nullptr) : normnorm_cuda_pack_running(&r, nullptr);
  if (e != 0) throw std::runtime_error("CUDA error " + std::to_string(e));
}

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

std::pair<int64_t, uint64_t> offsets_of(const py::dict& d, uint32_t group, uint32_t run, uint32_t chunk) {
  Problem p;
  p.storage = Storage(d["storage"].cast<int>());
  const auto g = d["geometry"].cast<std::vector<int64_t>>();
  p.geometry = {g[0] != 0, g[1], g[2], g[3], g[4]};
  p.noise.on = true;
  p.noise.position = strides(d["position"]);
  p.input = p.output = {reinterpret_cast<void*>(uintptr_t(1) << 40), strides(d["input"].cast<py::tuple>()[1])};
  switch (p.storage) {
    case Storage::kFloat64: return offsets<double>(p, group, run, chunk);
    case Storage::kBFloat16: return offsets<__nv_bfloat16>(p, group, run, chunk);
    default: return offsets<float>(p, group, run, chunk);
  }
}

py::object refusal_of(const py::dict& d) {
  Problem p;
  const auto g = d["geometry"].cast<std::vector<int64_t>>();
  p.geometry = {g[0] != 0, g[1], g[2], g[3], g[4]};
  const char* sentence = normnorm_cuda_refusal(&p);
  return sentence ? py::object(py::str(sentence)) : py::object(py::none());
}

std::vector<float> run_faulty(const std::string& name) {
  std::vector<float> out(64);
  const auto run = [](int blocks, int concurrent, const std::function<void()>& body) {
    host_cuda::run_grid(dim3(unsigned(blocks)), dim3(64), concurrent, body);
  };
  if (name == "diverging") run(1, 1, faulty::diverging);
  if (name == "deadlocked") run(1, 1, faulty::deadlocked);
  if (name == "uneven_cluster") run(2, 2, faulty::uneven_cluster);
  if (name == "racing") run(2, 1, [&] { faulty::racing(false, out.data()); });
  if (name == "orderly") run(2, 1, [&] { faulty::racing(true, out.data()); });
  return out;
}

PYBIND11_MODULE(NN_MODULE, m) {
  m.def("forward", [](const py::dict& d) { run(d, false); });
  m.def("backward", [](const py::dict& d) { run(d, true); });
  m.def("configure", [](int order, bool watch, const std::string& skip) {
    auto& s = host_cuda::settings();
    s.order = order;
    s.watch = watch;
    s.skip = skip;
    if (watch && skip.empty()) s.sites.clear();
  });
  m.def("plan", [](const py::dict& d, bool backward) {
    const Problem p = problem_of(d);
    std::vector<int> plan(5);
    normnorm_cuda_plan(&p, backward, plan.data());
    return plan;
  });
  m.def("fold_running", [](const py::dict& d) { running(d, true); });
  m.def("pack_running", [](const py::dict& d) { running(d, false); });
  m.def("run_faulty", run_faulty);
  m.def("offsets", offsets_of);
  m.def("refusal", refusal_of);
  m.def("grids", [] { return std::exchange(host_cuda::settings().grids, {}); });
  m.def("sites", [] { return host_cuda::settings().sites; });
  m.def(
      "device",
      [](int multiprocessors, int shared_bytes, bool clusters, bool cooperative, int co_resident, bool refuse_cooperative) {
        auto& s = host_cuda::settings();
        s.device = {multiprocessors, shared_bytes, clusters, cooperative};
        s.co_resident = co_resident;
        s.refuse_cooperative = refuse_cooperative;
      },
      py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("clusters"), py::arg("cooperative") = true,
      py::arg("co_resident") = 1 << 30, py::arg("refuse_cooperative") = false);
}
