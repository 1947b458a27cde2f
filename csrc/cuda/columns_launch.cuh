// The columns layout, launched: from a problem to kernel arguments, a plan, a workspace and launches.
#pragma once

#include "columns_streaming.cuh"
#include "rows_launch.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Blocks of a streaming launch that a multiprocessor has registers for: in the forward pass, in the backward pass's sums
// with chunks of eight and of four elements, and in its second round without and with fused operations or ragged chunks.
constexpr int kColumnBlocks = 4, kSumsBlocksOf8 = 2, kSumsBlocksOf4 = 3, kGradientBlocks = 3, kLargeGradientBlocks = 2;
// A pass over more rows is streamed. On an H200 streaming was faster with 65536 rows and equal with 12544; with fewer the
// host's time hid the difference.
constexpr int64_t kResidentRows = 8192, kResidentGradientRows = 1024;

// The forward and backward passes of one storage type, as RowsPass.
template <class T>
class ColumnsPass {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>;

 public:
  ColumnsPass(const Problem& p, bool backward, const Device& device, void* stream) : p_(p), stream_(stream) {
    ragged_ = is_ragged(backward);
    const Geometry& g = p.geometry;
    static_cast<KernelArgs<Real>&>(a_) = kernel_args<T>(p, ChunkMode());
    a_.width = uint32_t(g.length);
    a_.columns = uint32_t(g.inner * g.length);
    a_.tiles = uint32_t(ceil_div(a_.columns, kTileColumns<T>));
    slabs_ = int64_t(a_.tiles) * g.outer;
    Demand d;
    d.groups = slabs_;
    d.chunks = g.runs * kTileChunks;
    d.chunk_bytes = N * int(sizeof(Real)) * (backward ? 3 : 1);
    d.register_chunks = backward ? kColumnBackwardRegister<T> : kForwardRegister<T>;
    d.largest_block = kColumnThreads;
    d.static_shared = int(sizeof(TileShared<T>)) + kColumnWarps * kGradientSums * kTileColumns<T> * int(sizeof(Real));
    bool resident = a_.width == 1 && !(p.frozen && !backward) && p.round == Round::kAll;
    if (p.force.tier == Tier::kAuto)
      resident = resident && p.geometry.runs <= (backward ? kResidentGradientRows : kResidentRows);
    plan_ = resident ? choose_tile_plan(d, device, kColumnThreads, p.force) : Plan();
    if (plan_.tier == Tier::kGrid && device.present &&
        co_resident_blocks(tile_kernel(backward), tile_launch(), device) < tile_launch().grid)
      plan_ = Plan();
    Workspace workspace(p.workspace);
    if (plan_.tier == Tier::kGrid) {
      sync_.blocks = unsigned(plan_.blocks);
      sync_.counters = workspace.take<unsigned>(plan_.thread_groups);
      sync_.partial = workspace.take<Real>(int64_t(plan_.thread_groups) * 2 * plan_.blocks * kMaxSums * kTileColumns<T>);
    }
    place_stream(workspace, device, backward);  // also for co-operating blocks, whose launch the device may refuse
    if (backward) {
      a_.weight_partials = p.round == Round::kSums ? a_.partial  // not null: the kernel then includes the noise
                                                   : partials_of(workspace, p.grad_weight);
      a_.bias_partials = partials_of(workspace, p.grad_bias);
    }
    workspace_bytes_ = workspace.used();
  }

  Plan plan() const { return plan_; }
  size_t workspace() const { return workspace_bytes_; }
  int forward() const {
    return with_mode<T>(ragged_, [&](auto ragged) { return forward_as<ragged.value>(); });
  }

  int backward() const {
    int e = with_mode<T>(ragged_, [&](auto ragged) { return backward_as<ragged.value>(); });
    if (e == 0) e = reduce(a_.weight_partials, p_.grad_weight);
    if (e == 0) e = reduce(a_.bias_partials, p_.grad_bias);
    return e;
  }

 private:
  void place_stream(Workspace& workspace, const Device& device, bool backward) {
    a_.splits = splits(device, !backward ? kColumnBlocks : N == 8 ? kSumsBlocksOf8 : kSumsBlocksOf4);
    gradient_splits_ = splits(device, ragged_ || is_fused(p_, true) ? kLargeGradientBlocks : kGradientBlocks);
    if (plan_.tier != Tier::kGrid) plan_ = {Tier::kStreaming, kColumnThreads, int(a_.splits), int(slabs_), 0};
    a_.partial = workspace.take<Real>(slabs_ * a_.splits * kMaxSums * kTileColumns<T>);
    a_.mean = place_means<Real>(p_, workspace, p_.geometry.groups());
    a_.sums = workspace.take<Real>(p_.geometry.groups() * kMaxSums);
  }

  // Blocks a tile: at most as many as run at the same time or, where the tiles do not divide these, up to three more, whichever
  // number wastes the least of the last turn. Fewer blocks leave fewer partial sums.
  uint32_t splits(const Device& device, int blocks) const {
    if (p_.force.blocks) return uint32_t(p_.force.blocks);
    const int64_t most = ceil_div(p_.geometry.runs, kColumnRows), at_once = int64_t(device.multiprocessors) * blocks;
    const auto turns = [&](int64_t n) { return ceil_div(slabs_ * n, at_once); };
    const int64_t first = std::clamp(at_once / slabs_, int64_t(1), most);
    int64_t best = first;
    for (int64_t n = first + 1; n <= first + 3 && n <= most; ++n)
      if (turns(n) * best < turns(best) * n) best = n;
    return uint32_t(best);
  }

  // Whether a chunk of some tensor is not 16 aligned bytes, or does not begin at a multiple of its size in the order
  // of the noise.
  bool is_ragged(bool backward) const {
    bool ragged = p_.geometry.inner * p_.geometry.length % N != 0;
    const auto aligned = [&](const Strides& s, int64_t to) {
      return (p_.geometry.outer == 1 || s.outer % to == 0) && (p_.geometry.runs == 1 || s.run % to == 0);
    };
    each_operand(p_, backward, [&](const Operand& t) {
      ragged = ragged || elements_past_boundary<T>(t.data) != 0 || !aligned(t.stride, N);
    });
    return ragged || (p_.noise.on && !aligned(p_.noise.position, N));
  }

  Real* partials_of(Workspace& workspace, const Parameter& gradient) const {
    return gradient.data ? gradient_partials<T>(workspace, gradient, p_.geometry.outer, a_.columns) : nullptr;
  }
  int reduce(const Real* partial, const Parameter& gradient) const {
    return reduce_gradient<T>(partial, p_.geometry.outer, a_.columns, gradient, stream_);
  }

  using Kernel = void (*)(const ColumnsArgs<Real>);
  int round(Kernel kernel, const ColumnsArgs<Real>& a) const {
    return launch(kernel, {.grid = unsigned(slabs_ * a.splits), .threads = kColumnThreads, .stream = stream_}, a);
  }
  int round(Kernel kernel, Kernel finish, const ColumnsArgs<Real>& a) const {
    if (const int e = round(kernel, a)) return e;
    const unsigned groups = unsigned(p_.geometry.groups()), threads = finish_threads(int64_t(a.width) * a.splits);
    const Launch l = {.grid = groups, .threads = threads, .stream = stream_};
    return p_.round == Round::kAll ? launch(finish, l, a) : launch(column_leave<T>, l, a, round_sums(p_));
  }

  using TileKernel = void (*)(const ColumnsArgs<Real>, typename TileThreads<T>::Sync);
  Launch tile_launch() const { return resident_launch(plan_, stream_); }
  TileKernel tile_kernel(bool backward) const {
    return with_mode<T>(ragged_, [&](auto ragged) { return tile_kernel_as<ragged.value>(backward); });
  }
  template <bool kRagged>
  TileKernel tile_kernel_as(bool backward) const {
    const bool fused = is_fused(p_, backward);
    if (backward) return fused ? column_backward<T, kRagged, true> : column_backward<T, kRagged, false>;
    if (fused) return column_forward<T, kRagged, true, true>;
    return p_.noise.on ? column_forward<T, kRagged, true, false> : column_forward<T, kRagged, false, false>;
  }
  int launch_tiles(TileKernel kernel) const {
    if (const int e = zero(sync_.counters, size_t(plan_.thread_groups) * sizeof(unsigned), stream_)) return e;
    return launch(kernel, tile_launch(), a_, sync_);
  }

  template <bool kRagged>
  int forward_as() const {
    int e = kNotCoResident;
    if (plan_.tier == Tier::kGrid) e = launch_tiles(tile_kernel(false));
    if (e != kNotCoResident) return e;
    e = 0;
    ColumnsArgs<Real> a = a_;
    if (p_.runs(Round::kMoments)) {
      const Kernel fused = column_moments<T, kRagged, true>, plain = column_moments<T, kRagged, false>;
      e = round(fuses_prologue(p_, false) ? fused : plain, column_finish<T, Finish::kMoments>, a);
      read_sum_as_input(a);
    }
    if (!e && p_.runs(Round::kLambda)) e = round(column_lambda<T, kRagged>, column_finish<T, Finish::kLambda>, a);
    if (!e && p_.runs(Round::kMeanX)) e = round(column_sum_x<T, kRagged, false>, column_finish<T, Finish::kMean>, a);
    if (!e && p_.runs(Round::kDeviation))
      e = round(column_sum_x<T, kRagged, true>, column_finish<T, Finish::kDeviation>, a);
    if (e || !p_.runs(Round::kOutput)) return e;
    if (fuses_epilogue(p_, false)) return round(column_output<T, kRagged, true, true>, a);
    return round(p_.noise.on ? column_output<T, kRagged, true, false> : column_output<T, kRagged, false, false>, a);
  }

  template <bool kRagged>
  int backward_as() const {
    int e = kNotCoResident;
    if (plan_.tier == Tier::kGrid) e = launch_tiles(tile_kernel(true));
    if (e != kNotCoResident) return e;
    const Kernel sums = gradient_kernel<kRagged, true>(fuses_prologue(p_, true));
    e = p_.runs(Round::kSums) ? round(sums, column_finish<T, Finish::kGradient>, a_)
                              : launch_take_means<T>(p_, a_.sums, stream_);
    if (e || !p_.runs(Round::kGradient)) return e;
    ColumnsArgs<Real> a = a_;
    a.splits = gradient_splits_, a.partial = nullptr;
    return round(gradient_kernel<kRagged, false>(fuses_epilogue(p_, true)), a);
  }
  template <bool kRagged, bool kSums>
  static Kernel gradient_kernel(bool fused) {
    return fused ? column_gradient<T, kRagged, kSums, true> : column_gradient<T, kRagged, kSums, false>;
  }

  const Problem& p_;
  ColumnsArgs<Real> a_ = {};
  void* stream_;
  bool ragged_ = false;
  Plan plan_;
  typename TileThreads<T>::Sync sync_ = {};
  int64_t slabs_ = 1;
  uint32_t gradient_splits_ = 1;
  size_t workspace_bytes_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
