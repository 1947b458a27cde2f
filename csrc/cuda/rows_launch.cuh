// The rows layout, launched: from a problem to kernel arguments, a plan, a workspace and launches.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "rows_streaming.cuh"

namespace normnorm {
namespace cuda {
namespace {

// How a problem's tensors are divided into chunks (rows.cuh).
struct ChunkMode {
  bool ragged = true;  // runs begin or end within a chunk
  bool wide = false;   // ragged: whole chunks are aligned to 16 bytes
  Strides origin;      // of KernelArgs::chunk_origin
  int64_t base = 0;    // of KernelArgs::chunk_base
};

inline bool congruent(const Problem& p, const Strides& a, const Strides& b, int64_t modulus) {
  const Geometry& g = p.geometry;
  const auto differ = [&](int64_t x, int64_t y, int64_t extent) { return extent > 1 && (x - y) % modulus != 0; };
  return !differ(a.outer, b.outer, g.outer) && !differ(a.inner, b.inner, g.inner) && !differ(a.run, b.run, g.runs);
}

template <class T>
int64_t elements_past_boundary(const void* data) {
  return int64_t(reinterpret_cast<uintptr_t>(data) / sizeof(T) % kChunkOf<T>);
}

// Whether 32 bits count a group's elements in units of `unit`, from the start of its first run to the end of its last.
inline bool counts_in_32_bits(const Geometry& g, const Strides& s, int64_t unit) {
  return ((g.runs - 1) * s.run + g.length) / unit < int64_t(1) << 32;
}

// Chunks are wide where all tensors have the same chunk boundaries in memory, and the order of the noise has them too.
template <class T>
ChunkMode chunk_mode(const Problem& p, bool backward) {
  constexpr int N = kChunkOf<T>;
  const int64_t base = elements_past_boundary<T>(p.input.data);
  ChunkMode m;
  m.wide = sizeof(T) < 8;
  each_operand(p, backward, [&](const Operand& t) {
    m.wide = m.wide && elements_past_boundary<T>(t.data) == base && congruent(p, t.stride, p.input.stride, N);
  });
  if (p.noise.on) m.wide = m.wide && base == 0 && congruent(p, p.noise.position, p.input.stride, N);
  m.origin = m.wide ? p.input.stride : p.noise.position;
  m.base = m.wide ? base : 0;
  const bool parameters_aligned =
      p.affine != Affine::kPerElement ||
      (reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0 && reinterpret_cast<uintptr_t>(p.bias.data) % 16 == 0);
  m.ragged = !m.wide || base != 0 || p.geometry.length % N != 0 || !congruent(p, m.origin, Strides(), N) ||
             !parameters_aligned;
  each_operand(p, backward, [&](const Operand& t) {
    m.ragged = m.ragged || !counts_in_32_bits(p.geometry, t.stride, N);
  });
  m.ragged = m.ragged || !counts_in_32_bits(p.geometry, p.noise.position, N);
  return m;
}

inline ChunkStrides chunk_strides(const Geometry& g, const Strides& s, int64_t chunk) {
  return {s, uint32_t(s.run / chunk - g.length / chunk)};
}

template <class T>
KernelArgs<RealOf<T>> kernel_args(const Problem& p, const ChunkMode& mode) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  KernelArgs<Real> a = {};
  const int64_t per_run = mode.ragged ? ceil_div(p.geometry.length + N - 1, N) : p.geometry.length / N;
  a.length = p.geometry.length;
  a.groups = uint32_t(p.geometry.groups());
  a.runs = uint32_t(p.geometry.runs);
  a.inner = FastDivide(uint32_t(p.geometry.inner));
  a.chunks_per_run = p.geometry.runs == 1 ? FastDivide::always_zero(uint32_t(per_run)) : FastDivide(uint32_t(per_run));
  a.chunks = uint32_t(per_run * p.geometry.runs);
  a.wide = mode.wide;
  a.input = p.input.data, a.grad = p.grad_output.data, a.output = p.output.data;
  a.at_input = chunk_strides(p.geometry, p.input.stride, N);
  a.at_grad = chunk_strides(p.geometry, p.grad_output.stride, N);
  a.at_output = chunk_strides(p.geometry, p.output.stride, N);
  a.at_noise = chunk_strides(p.geometry, p.noise.position, N);
  a.chunk_origin = mode.origin, a.chunk_base = mode.base;
  a.stats = static_cast<Real*>(p.stats);
  a.weight = p.weight.data, a.weight_in_storage = p.weight.in_storage_type;
  a.bias = p.bias.data, a.bias_in_storage = p.bias.in_storage_type;
  if (p.weight.data && p.bias.data && p.weight.in_storage_type == p.bias.in_storage_type)
    a.parameters = p.weight.in_storage_type ? Parameters::kStorage : Parameters::kCompute;
  a.affine = p.affine;
  a.seed = p.seed, a.stream = p.noise.stream;
  a.noise = p.noise.on, a.given_scale = p.noise.given_scale, a.frozen = p.frozen;
  a.noise_train = Real(p.noise.train);
  // the caller of Round::kGradient gives means
  a.inverse_count_double = p.round == Round::kGradient ? 1.0 : 1.0 / double(p.geometry.group_size());
  a.inverse_count = Real(a.inverse_count_double);
  a.settings = p.settings.as<Real>();
  // psi and its slope by lambda then lose 2^-20 and 2^-16, where storage rounds within 2^-11 (float16) or 2^-8 of a value
  if (sizeof(T) == 2) a.settings.small_exponent = Real(1) / 16;
  const auto tensor = [&](const Operand& t) { return FusedTensor{t.data, chunk_strides(p.geometry, t.stride, N)}; };
  a.fused = {tensor(p.residual), tensor(p.addend), tensor(p.sum), tensor(p.activated),
             tensor(p.grad_sum), p.activation};
  return a;
}

// The rounds after the first read the sum that it wrote, where there is an addend.
template <class Real>
void read_sum_as_input(KernelArgs<Real>& a) {
  if (a.fused.addend.data == nullptr) return;
  a.input = a.fused.sum.data;
  a.at_input = a.fused.sum.at;
}

// f(std::bool_constant<kRagged>()); float64 has ragged kernels only.
template <class T, class F>
auto with_mode(bool ragged, F f) {
  if constexpr (sizeof(T) == 8) return f(std::true_type());
  else return ragged ? f(std::true_type()) : f(std::false_type());
}

// Where a round alone leaves its sums.
inline RoundSums round_sums(const Problem& p) { return {p.round, int(kRoundSums[int(p.round)]), p.sums}; }

// The mean of x between rounds 3 and 4, which is in the statistics where each is computed alone.
template <class Real>
Real* place_means(const Problem& p, Workspace& workspace, int64_t groups) {
  if (p.round == Round::kAll) return workspace.take<Real>(groups);
  return static_cast<Real*>(p.stats) + kNoiseScale * p.geometry.groups();
}

template <class T>
int launch_take_means(const Problem& p, RealOf<T>* sums, void* stream) {
  const unsigned groups = unsigned(p.geometry.groups());
  const Launch l = {.grid = unsigned(ceil_div(groups, kStreamThreads)), .threads = kStreamThreads, .stream = stream};
  return launch(take_means<T>, l, p.sums, groups, sums);
}

// A resident kernel of the forward pass for each kind of thread group.
template <class Real>
struct ResidentKernels {
  void (*block)(const KernelArgs<Real>, typename BlockThreads<Real>::Sync);
  void (*cluster)(const KernelArgs<Real>, typename ClusterThreads<Real>::Sync);
  void (*grid)(const KernelArgs<Real>, typename GridThreads<Real>::Sync);
};

inline Launch resident_launch(const Plan& plan, void* stream) {
  return {.grid = unsigned(plan.thread_groups * plan.blocks),
          .threads = unsigned(plan.threads),
          .shared = plan.shared,
          .cluster = plan.tier == Tier::kCluster ? plan.blocks : 1,
          .cooperative = plan.tier == Tier::kGrid,
          .stream = stream};
}

constexpr int kStreamBlocks = 16;         // of a multiprocessor: more than run at once, to even out the tail
constexpr int kOutputChunks = 16;         // of a thread in a single round: enough to hide the start of a block

// The forward and backward passes of one storage type: chooses the plan and kernels, divides the workspace, launches.
template <class T>
class RowsPass {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>;

 public:
  RowsPass(const Problem& p, bool backward, const Device& device, void* stream)
      : p_(p), backward_(backward), mode_(chunk_mode<T>(p, backward)), args_(kernel_args<T>(p, mode_)), stream_(stream) {
    Demand d;
    d.groups = p.geometry.groups();
    d.chunks = args_.chunks;
    d.chunk_bytes = N * int(sizeof(Real)) * (backward ? 3 : 1);
    d.register_chunks = backward ? kBackwardRegister<T> : kForwardRegister<T>;
    // The main kernel can sum the gradients of a weight per element where a thread's chunks are the same elements of every
    // group.
    const bool sums_elements = backward && p.affine == Affine::kPerElement && wants_parameters() && !mode_.ragged;
    d.sum_bytes = sums_elements ? 2 * N * int(sizeof(Real)) : 0;
    d.static_shared = kReduceNumbers * int(sizeof(Real));
    d.one_block = backward;
    d.largest_block = !backward ? kForwardBlock : is_fused(p, true) ? kFusedBackwardBlock : kBackwardBlock;
    choose(d, device);
    args_.shared_chunks = uint32_t(plan_.shared_chunks);
    place(device);
  }

  Plan plan() const { return plan_; }
  size_t workspace() const { return workspace_bytes_; }

  int forward() const {
    int e = kNotCoResident;
    if (plan_.tier != Tier::kStreaming) e = launch_resident(args_);
    if (e != kNotCoResident) return e;
    return with_mode<T>(mode_.ragged, [&](auto ragged) { return stream_forward<ragged.value>(); });
  }

  int backward() const {
    int e = kNotCoResident;
    if (plan_.tier != Tier::kStreaming) e = launch_resident(main_args());
    if (e == kNotCoResident) e = with_mode<T>(mode_.ragged, [&](auto ragged) { return stream_backward<ragged.value>(); });
    if (e == 0 && separate_gradients_)
      e = with_mode<T>(mode_.ragged, [&](auto ragged) { return parameter_pass<ragged.value>(); });
    if (e == 0) e = reduce(args_.weight_partials, p_.grad_weight);
    if (e == 0) e = reduce(args_.bias_partials, p_.grad_bias);
    return e;
  }

 private:
  // The plan; where the device would not run its blocks at the same time, one of the next tier.
  void choose(const Demand& d, Device device) {
    for (;;) {
      plan_ = choose_plan(d, device, p_.force);
      if (backward_ && plan_.tier != Tier::kBlock) plan_ = Plan();
      if (p_.round != Round::kAll || (p_.frozen && !backward_)) plan_ = Plan();
      if (plan_.tier == Tier::kStreaming) return;
      const int64_t blocks = co_resident_blocks(d, device);
      const bool wait = plan_.tier != Tier::kBlock;  // for one another
      if (wait && blocks < int64_t(plan_.blocks) * (plan_.tier == Tier::kGrid ? plan_.thread_groups : 1)) {
        if (p_.force.tier != Tier::kAuto) {
          plan_ = Plan();
          return;
        }
        (plan_.tier == Tier::kCluster ? device.clusters : device.cooperative) = false;
        continue;
      }
      // each thread group prefetches the group that it processes next
      if (plan_.tier != Tier::kGrid && !p_.force.thread_groups)
        plan_.thread_groups =
            int(std::clamp((blocks > 0 ? blocks : device.multiprocessors) / plan_.blocks, int64_t(1), d.groups));
      return;
    }
  }

  // How many blocks of the plan the device runs at the same time; of one that is not present an estimate.
  int64_t co_resident_blocks(const Demand& d, const Device& device) const {
    if (!device.present)
      return device.multiprocessors * std::min(count_fitting(d, device, plan_), int64_t(d.largest_block / plan_.threads));
    const Launch l = resident_launch(plan_, nullptr);
    return with_mode<T>(mode_.ragged, [&](auto ragged) {
      if (backward_) return cuda::co_resident_blocks(backward_kernel<ragged.value>(), l, device);
      const ResidentKernels<Real> k = forward_kernels<ragged.value>();
      if (plan_.tier == Tier::kBlock) return cuda::co_resident_blocks(k.block, l, device);
      return l.cooperative ? cuda::co_resident_blocks(k.grid, l, device) : cuda::co_resident_blocks(k.cluster, l, device);
    });
  }

  int launch_resident(const KernelArgs<Real>& a) const {
    const Launch l = resident_launch(plan_, stream_);
    const typename BlockThreads<Real>::Sync alone = {};
    return with_mode<T>(mode_.ragged, [&](auto ragged) {
      if (backward_) return launch(backward_kernel<ragged.value>(), l, a, alone);
      const ResidentKernels<Real> k = forward_kernels<ragged.value>();
      if (plan_.tier == Tier::kBlock) return launch(k.block, l, a, alone);
      if (plan_.tier == Tier::kCluster) return launch(k.cluster, l, a, typename ClusterThreads<Real>::Sync());
      if (const int e = zero(sync_.counters, size_t(plan_.thread_groups) * sizeof(unsigned), stream_)) return e;
      return launch(k.grid, l, a, sync_);
    });
  }

  bool wants_parameters() const { return p_.grad_weight.data || p_.grad_bias.data; }

  // Divides the workspace, and decides where the parameters' gradients are summed.
  void place(const Device& device) {
    Workspace workspace(p_.workspace);
    sync_ = {nullptr, nullptr, unsigned(plan_.blocks)};
    if (plan_.tier == Tier::kGrid) {
      sync_.counters = workspace.take<unsigned>(plan_.thread_groups);
      sync_.partial = workspace.take<Real>(int64_t(plan_.thread_groups) * 2 * kMaxSums * plan_.blocks);
    }
    // also for co-operating blocks, whose launch the device may refuse
    if (plan_.tier == Tier::kStreaming || plan_.tier == Tier::kGrid) place_stream(workspace, device);
    if (backward_ && wants_parameters()) place_partials(workspace, device);
    workspace_bytes_ = workspace.used();
  }

  void place_stream(Workspace& workspace, const Device& device) {
    static_cast<KernelArgs<Real>&>(stream_args_) = args_;
    const int64_t groups = p_.geometry.groups();
    const bool alone = p_.round != Round::kAll;
    // The output round alone; also evaluation without noise, or with a given scale of the noise.
    const bool once = alone ? p_.round == Round::kOutput : p_.frozen && !backward_ && !p_.finds_scale();
    const int64_t most = ceil_div(args_.chunks, kStreamThreads);
    int64_t splits = ceil_div(int64_t(device.multiprocessors) * kStreamBlocks, groups);
    if (once) splits = std::max(splits, ceil_div(most, kOutputChunks));
    splits = splits > most ? most : splits;
    stream_args_.splits = uint32_t(p_.force.blocks ? p_.force.blocks : splits);
    if (plan_.tier == Tier::kStreaming)
      plan_ = {Tier::kStreaming, kStreamThreads, int(stream_args_.splits), int(groups), 0};
    if (once) return;  // without sums
    stream_args_.partial = workspace.take<Real>(groups * stream_args_.splits * kMaxSums);
    stream_args_.mean = place_means<Real>(p_, workspace, groups);
    stream_args_.sums = workspace.take<Real>(groups * kMaxSums);
    // not null, so that the kernel includes the noise in the sums
    if (p_.round == Round::kSums) stream_args_.weight_partials = stream_args_.partial;
  }

  void place_partials(Workspace& workspace, const Device& device) {
    const Geometry& g = p_.geometry;
    elements_ = p_.affine == Affine::kPerElement ? g.length : p_.affine == Affine::kPerRun ? g.inner * g.runs : g.inner;
    partials_ = g.outer;
    if (p_.affine == Affine::kPerElement) {
      slabs_ = uint32_t(ceil_div(int64_t(device.multiprocessors) * 8, ceil_div(args_.chunks, kStreamThreads)));
      if (slabs_ > args_.groups) slabs_ = args_.groups;
      partials_ = plan_.sums_elements ? plan_.thread_groups : slabs_;
    }
    separate_gradients_ = p_.affine == Affine::kPerRun || (p_.affine == Affine::kPerElement && !plan_.sums_elements);
    args_.weight_partials = partials_of(workspace, p_.grad_weight);
    args_.bias_partials = partials_of(workspace, p_.grad_bias);
    static_cast<KernelArgs<Real>&>(stream_args_) = main_args();
  }

  // Where a separate kernel sums the parameters' gradients, the main kernels compute neither these nor the noise.
  KernelArgs<Real> main_args() const {
    KernelArgs<Real> a = args_;
    if (separate_gradients_) a.weight_partials = a.bias_partials = nullptr;
    return a;
  }

  Real* partials_of(Workspace& workspace, const Parameter& gradient) const {
    return gradient.data ? gradient_partials<T>(workspace, gradient, partials_, elements_) : nullptr;
  }
  int reduce(const Real* partial, const Parameter& gradient) const {
    return reduce_gradient<T>(partial, partials_, elements_, gradient, stream_);
  }

  template <bool kRagged>
  ResidentKernels<Real> forward_kernels() const {
    if (is_fused(p_, false)) return forward_kernels<kRagged, true, true>();
    return args_.noise ? forward_kernels<kRagged, true, false>() : forward_kernels<kRagged, false, false>();
  }
  template <bool kRagged, bool kNoise, bool kFused>
  ResidentKernels<Real> forward_kernels() const {
    return {rows_forward<T, kRagged, kNoise, BlockThreads<Real>, kFused>,
            rows_forward<T, kRagged, kNoise, ClusterThreads<Real>, kFused>,
            rows_forward<T, kRagged, kNoise, GridThreads<Real>, kFused>};
  }

  using BackwardKernel = void (*)(const KernelArgs<Real>, typename BlockThreads<Real>::Sync);
  template <bool kRagged>
  BackwardKernel backward_kernel() const {
    return is_fused(p_, true) ? backward_kernel<kRagged, true>() : backward_kernel<kRagged, false>();
  }
  template <bool kRagged, bool kFused>
  BackwardKernel backward_kernel() const {
    if constexpr (!kRagged)
      if (plan_.sums_elements) return rows_backward<T, kRagged, true, kFused>;
    return rows_backward<T, kRagged, false, kFused>;
  }

  using StreamKernel = void (*)(const StreamingArgs<Real>);
  int round(StreamKernel kernel, const StreamingArgs<Real>& s) const {
    return launch(kernel, {.grid = s.groups * s.splits, .threads = kStreamThreads, .stream = stream_}, s);
  }
  int round(StreamKernel kernel, StreamKernel finish, const StreamingArgs<Real>& s) const {
    if (const int e = round(kernel, s)) return e;
    const Launch l = {.grid = s.groups, .threads = finish_threads(s.splits), .stream = stream_};
    return p_.round == Round::kAll ? launch(finish, l, s) : launch(stream_leave<T>, l, s, round_sums(p_));
  }

  template <bool kRagged>
  int stream_forward() const {
    StreamingArgs<Real> s = stream_args_;
    int e = 0;
    if (p_.runs(Round::kMoments)) {
      const auto fused = stream_moments<T, kRagged, true>, plain = stream_moments<T, kRagged, false>;
      e = round(fuses_prologue(p_, false) ? fused : plain, stream_finish<T, Finish::kMoments>, s);
      read_sum_as_input(s);
    }
    if (!e && p_.runs(Round::kLambda)) e = round(stream_lambda<T, kRagged>, stream_finish<T, Finish::kLambda>, s);
    if (!e && p_.runs(Round::kMeanX)) e = round(stream_x<T, kRagged, false>, stream_finish<T, Finish::kMean>, s);
    if (!e && p_.runs(Round::kDeviation)) e = round(stream_x<T, kRagged, true>, stream_finish<T, Finish::kDeviation>, s);
    if (e || !p_.runs(Round::kOutput)) return e;
    if (fuses_epilogue(p_, false)) return round(stream_output<T, kRagged, true, true>, s);
    return round(args_.noise ? stream_output<T, kRagged, true, false> : stream_output<T, kRagged, false, false>, s);
  }

  template <bool kRagged, bool kSums>
  static StreamKernel gradient_kernel(bool fused) {
    return fused ? stream_gradient<T, kRagged, kSums, true> : stream_gradient<T, kRagged, kSums, false>;
  }

  template <bool kRagged>
  int stream_backward() const {
    const StreamingArgs<Real>& s = stream_args_;
    const auto sums = gradient_kernel<kRagged, true>(fuses_prologue(p_, true));
    const int e = p_.runs(Round::kSums) ? round(sums, stream_finish<T, Finish::kGradient>, s)
                                        : launch_take_means<T>(p_, s.sums, stream_);
    if (e || !p_.runs(Round::kGradient)) return e;
    return round(gradient_kernel<kRagged, false>(fuses_epilogue(p_, true)), s);
  }

  template <bool kRagged>
  int parameter_pass() const {
    Launch l = {.threads = kStreamThreads, .stream = stream_};
    if (p_.affine == Affine::kPerRun) {
      l.grid = unsigned(ceil_div(p_.geometry.groups() * p_.geometry.runs, kStreamThreads / 32));
      return launch(run_parameters<T, kRagged>, l, args_);
    }
    l.grid = unsigned(ceil_div(ceil_div(args_.length, N), kStreamThreads)) * slabs_;
    return launch(element_parameters_pass<T, kRagged>, l, args_, slabs_);
  }

  const Problem& p_;
  bool backward_;
  ChunkMode mode_;
  KernelArgs<Real> args_;
  void* stream_;
  Plan plan_;
  size_t workspace_bytes_ = 0;
  typename GridThreads<Real>::Sync sync_;
  StreamingArgs<Real> stream_args_ = {};
  int64_t partials_ = 1, elements_ = 0;
  uint32_t slabs_ = 1;
  bool separate_gradients_ = false;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
