// The forward and the backward pass of the rows walk for one storage type: which kernels run, and on what workspace.
#pragma once

#include <algorithm>

#include "rows_launch.cuh"
#include "rows_parameters.cuh"
#include "rows_stream.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int64_t kWaveBytes = 32 << 20;  // of tensors that the rounds of one wave read again: they are to stay in L2
constexpr int kOutputChunks = 16;         // of a thread where one round alone runs: enough to cover the start of a block

template <class T>
class RowsPass {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>;

 public:
  RowsPass(const Problem& p, bool backward, const Device& device, void* stream)
      : p_(p), backward_(backward), mode_(chunk_mode<T>(p, backward)), args_(rows_args<T>(p, mode_)), stream_(stream) {
    Demand d;
    d.groups = p.geometry.groups();
    d.chunks = args_.chunks;
    d.chunk_bytes = N * int(sizeof(Real)) * (backward ? 3 : 1);
    d.register_chunks = backward ? kBackwardRegister<T> : kForwardRegister<T>;
    d.team_register_chunks = backward ? kTeamBackwardRegister<T> : kForwardRegister<T>;
    // A thread can sum the gradients of its chunks' weights itself where its chunks are the same columns of every row.
    const bool element_gradients = backward && p.affine == Affine::kPerElement && wants_parameters();
    d.sums_elements = element_gradients && !mode_.ragged;
    d.static_shared = kTeamNumbers * int(sizeof(Real));
    d.largest_block = !backward ? kForwardBlock : joins(p, true) ? kJoinedBackwardBlock : kBackwardBlock;
    chunk_bytes_ = size_t(d.chunk_bytes);
    choose(d, device);
    place(device);
  }

  Plan plan() const { return plan_; }
  size_t workspace() const { return carved_; }

  int forward() const {
    int e = kNotAtOnce;
    if (plan_.rung != Rung::kStreaming) e = start_team<Real>(kernels(), plan_, chunk_bytes_, args_, sync_, stream_);
    if (e != kNotAtOnce) return e;
    return mode_.ragged ? stream_forward<true>() : aligned_stream_forward();
  }

  int backward() const {
    int e = kNotAtOnce;
    if (plan_.rung != Rung::kStreaming) e = start_team<Real>(kernels(), plan_, chunk_bytes_, main_args(), sync_, stream_);
    if (e == kNotAtOnce) e = mode_.ragged ? stream_backward<true>() : aligned_stream_backward();
    if (e == 0 && parts_separate_) e = mode_.ragged ? parameter_pass<true>() : aligned_parameter_pass();
    if (e == 0) e = fold(args_.weight_part, p_.grad_weight);
    if (e == 0) e = fold(args_.bias_part, p_.grad_bias);
    return e;
  }

 private:
  // Down the ladder as far as what the device would run at once.
  void choose(const Demand& d, Device device) {
    for (;;) {
      plan_ = choose_plan(d, device, p_.force);
      fused_ = d.sums_elements && plan_.shared_chunks == 0 && (plan_.rung == Rung::kBlock || plan_.rung == Rung::kCluster);
      if (p_.frozen && !backward_) plan_.rung = Rung::kStreaming;
      if (plan_.rung != Rung::kCluster && plan_.rung != Rung::kGrid) return;
      if (team_runs_at_once<Real>(kernels(), plan_, chunk_bytes_, device)) return;
      if (p_.force.rung != Rung::kAuto) {
        plan_ = Plan();
        return;
      }
      (plan_.rung == Rung::kCluster ? device.clusters : device.cooperative) = false;
    }
  }

  TeamKernels<Real> kernels() const {
    if (backward_) return mode_.ragged ? backward_kernels<true>() : aligned_backward_kernels();
    return mode_.ragged ? forward_kernels<true>() : aligned_forward_kernels();
  }

  bool wants_parameters() const { return p_.grad_weight.data || p_.grad_bias.data; }

  // Carves the workspace, and decides where the parameters' gradients are summed.
  void place(const Device& device) {
    Carver carver(p_.workspace);
    sync_ = {nullptr, nullptr, unsigned(plan_.blocks)};
    if (plan_.rung == Rung::kGrid) {
      sync_.counters = carver.take<unsigned>(plan_.teams);
      sync_.partial = carver.take<Real>(int64_t(plan_.teams) * 2 * kMaxSums * plan_.blocks);
    }
    // beside the co-operating blocks' as well, in case the device will not have them
    if (plan_.rung == Rung::kStreaming || plan_.rung == Rung::kGrid) place_stream(carver, device);
    if (backward_ && wants_parameters()) place_parts(carver, device);
    carved_ = carver.used();
  }

  void place_stream(Carver& carver, const Device& device) {
    stream_args_.rows = args_;
    const int64_t groups = p_.geometry.groups();
    // One round alone, that of the output: evaluation without noise, or with a given scale of the noise.
    const bool once = p_.frozen && !backward_ && (!p_.noise.on || p_.noise.given_scale);
    const int again = backward_ ? (p_.relu ? 3 : 2) : 1;  // tensors
    const int64_t bytes = p_.geometry.group_size() * int64_t(sizeof(T)) * again;
    wave_ = once ? groups : kWaveBytes / bytes;
    wave_ = wave_ < 1 ? 1 : wave_ > groups ? groups : wave_;
    const int64_t most = ceil_div(args_.chunks, kStreamThreads);
    int64_t splits = ceil_div(int64_t(device.multiprocessors) * (2048 / kStreamThreads), wave_);
    if (once) splits = std::max(splits, ceil_div(most, kOutputChunks));
    splits = splits > most ? most : splits;
    stream_args_.splits = uint32_t(p_.force.blocks ? p_.force.blocks : splits);
    if (p_.force.teams) wave_ = p_.force.teams;
    if (plan_.rung == Rung::kStreaming) plan_ = {Rung::kStreaming, kStreamThreads, int(stream_args_.splits), int(wave_), 0};
    if (once) return;  // no sums
    stream_args_.part = carver.take<Real>(wave_ * stream_args_.splits * kMaxSums);
    stream_args_.mean = carver.take<Real>(wave_);
    stream_args_.sums = carver.take<Real>(wave_ * kMaxSums);
  }

  void place_parts(Carver& carver, const Device& device) {
    const Geometry& g = p_.geometry;
    elements_ = p_.affine == Affine::kPerElement ? g.length : p_.affine == Affine::kPerRun ? g.inner * g.runs : g.inner;
    parts_ = g.outer;
    if (p_.affine == Affine::kPerElement) {
      slabs_ = uint32_t(ceil_div(int64_t(device.multiprocessors) * 8, ceil_div(args_.chunks, kStreamThreads)));
      if (slabs_ > args_.groups) slabs_ = args_.groups;
      parts_ = fused_ ? plan_.teams : slabs_;
    }
    parts_separate_ = p_.affine == Affine::kPerRun || (p_.affine == Affine::kPerElement && !fused_);
    args_.weight_part = part_of(carver, p_.grad_weight);
    args_.bias_part = part_of(carver, p_.grad_bias);
    stream_args_.rows = main_args();
  }

  // Where a pass of its own sums the parameters' gradients, the main pass leaves them, and the noise, alone.
  RowsArgs<Real> main_args() const {
    RowsArgs<Real> a = args_;
    if (parts_separate_) a.weight_part = a.bias_part = nullptr;
    return a;
  }

  Real* part_of(Carver& carver, const Parameter& gradient) const {
    return gradient.data ? parameter_part<T>(carver, gradient, parts_, elements_) : nullptr;
  }
  int fold(const Real* part, const Parameter& gradient) const {
    return fold_parameter<T>(part, parts_, elements_, gradient, stream_);
  }

  template <bool kRagged>
  TeamKernels<Real> forward_kernels() const {
    if (joins(p_, false)) return forward_kernels<kRagged, true, true>();
    return args_.noise ? forward_kernels<kRagged, true, false>() : forward_kernels<kRagged, false, false>();
  }
  template <bool kRagged, bool kNoise, bool kJoined>
  TeamKernels<Real> forward_kernels() const {
    return {rows_forward<T, kRagged, kNoise, BlockTeam<Real>, kJoined>,
            rows_forward<T, kRagged, kNoise, ClusterTeam<Real>, kJoined>,
            rows_forward<T, kRagged, kNoise, GridTeam<Real>, kJoined>};
  }

  template <bool kRagged>
  TeamKernels<Real> backward_kernels() const {
    return joins(p_, true) ? backward_kernels<kRagged, true>() : backward_kernels<kRagged, false>();
  }
  template <bool kRagged, bool kJoined>
  TeamKernels<Real> backward_kernels() const {
    TeamKernels<Real> k = {rows_backward<T, kRagged, false, BlockTeam<Real>, kJoined>,
                           rows_backward<T, kRagged, false, ClusterTeam<Real>, kJoined>,
                           rows_backward<T, kRagged, false, GridTeam<Real>, kJoined>};
    if constexpr (!kRagged)
      if (fused_) {
        k.block = rows_backward<T, kRagged, true, BlockTeam<Real>, kJoined>;
        k.cluster = rows_backward<T, kRagged, true, ClusterTeam<Real>, kJoined>;
      }
    return k;
  }

  // f(arguments, blocks) once a wave of groups.
  template <class F>
  int each_wave(F f) const {
    int e = 0;
    for (int64_t first = 0; first < p_.geometry.groups() && e == 0; first += wave_) {
      StreamArgs<Real> s = stream_args_;
      s.first_group = uint32_t(first);
      const int64_t left = p_.geometry.groups() - first;
      e = f(s, unsigned(left < wave_ ? left : wave_));
    }
    return e;
  }

  int round(void (*kernel)(const StreamArgs<Real>), const StreamArgs<Real>& s, unsigned groups) const {
    Start start_at;
    start_at.threads = kStreamThreads;
    start_at.grid = groups * s.splits;
    start_at.stream = stream_;
    return start(kernel, start_at, s);
  }
  int round(void (*kernel)(const StreamArgs<Real>), void (*finish)(const StreamArgs<Real>), const StreamArgs<Real>& s,
            unsigned groups) const {
    if (const int e = round(kernel, s, groups)) return e;
    Start start_at;
    start_at.threads = finish_threads(s.splits);
    start_at.grid = groups;
    start_at.stream = stream_;
    return start(finish, start_at, s);
  }

  template <bool kRagged>
  int stream_forward() const {
    return each_wave([&](StreamArgs<Real> s, unsigned groups) {
      int e = 0;
      if (!p_.frozen) {
        const auto joined = stream_moments<T, kRagged, true>, plain = stream_moments<T, kRagged, false>;
        e = round(joins_first(p_, false) ? joined : plain, stream_finish<T, Finish::kMoments>, s, groups);
        s.rows = after_first_round(s.rows);
        if (!e) e = round(stream_lambda<T, kRagged>, stream_finish<T, Finish::kLambda>, s, groups);
      }
      if (!e && args_.noise && !args_.given_scale) {
        e = round(stream_x<T, kRagged, false>, stream_finish<T, Finish::kMean>, s, groups);
        if (!e) e = round(stream_x<T, kRagged, true>, stream_finish<T, Finish::kDeviation>, s, groups);
      }
      if (e) return e;
      if (joins_last(p_, false)) return round(stream_output<T, kRagged, true, true>, s, groups);
      const auto noisy = stream_output<T, kRagged, true, false>, quiet = stream_output<T, kRagged, false, false>;
      return round(args_.noise ? noisy : quiet, s, groups);
    });
  }

  using StreamKernel = void (*)(const StreamArgs<Real>);
  template <bool kRagged, bool kSums>
  static StreamKernel gradient_kernel(bool joined) {
    return joined ? stream_gradient<T, kRagged, kSums, true> : stream_gradient<T, kRagged, kSums, false>;
  }

  template <bool kRagged>
  int stream_backward() const {
    return each_wave([&](const StreamArgs<Real>& s, unsigned groups) {
      const auto sums = gradient_kernel<kRagged, true>(joins_first(p_, true));
      const int e = round(sums, stream_finish<T, Finish::kGradient>, s, groups);
      if (e || !args_.output) return e;
      return round(gradient_kernel<kRagged, false>(joins_last(p_, true)), s, groups);
    });
  }

  template <bool kRagged>
  int parameter_pass() const {
    Start s;
    s.threads = kStreamThreads;
    s.stream = stream_;
    if (p_.affine == Affine::kPerRun) {
      s.grid = unsigned(ceil_div(p_.geometry.groups() * p_.geometry.runs, kStreamThreads / 32));
      return start(run_parameters<T, kRagged>, s, args_);
    }
    s.grid = unsigned(ceil_div(ceil_div(args_.length, N), kStreamThreads)) * slabs_;
    return start(element_parameters_pass<T, kRagged>, s, args_, slabs_);
  }

  // float64 has the ragged kernels only.
  TeamKernels<Real> aligned_forward_kernels() const { return forward_kernels<sizeof(T) == 8>(); }
  TeamKernels<Real> aligned_backward_kernels() const { return backward_kernels<sizeof(T) == 8>(); }
  int aligned_stream_forward() const { return stream_forward<sizeof(T) == 8>(); }
  int aligned_stream_backward() const { return stream_backward<sizeof(T) == 8>(); }
  int aligned_parameter_pass() const { return parameter_pass<sizeof(T) == 8>(); }

  const Problem& p_;
  bool backward_;
  ChunkMode mode_;
  RowsArgs<Real> args_;
  void* stream_;
  Plan plan_;
  size_t chunk_bytes_ = 0, carved_ = 0;
  typename GridTeam<Real>::Sync sync_;
  StreamArgs<Real> stream_args_ = {};
  int64_t wave_ = 1, parts_ = 1, elements_ = 0;
  uint32_t slabs_ = 1;
  bool fused_ = false, parts_separate_ = false;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
