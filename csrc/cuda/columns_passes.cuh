// The forward and the backward pass of the columns walk for one storage type.
#pragma once

#include "columns_resident.cuh"
#include "parts.cuh"
#include "rows_launch.cuh"

namespace normnorm {
namespace cuda {
namespace {

template <class T>
class ColumnsPass {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>;

 public:
  ColumnsPass(const Problem& p, bool backward, const Device& device, void* stream) : p_(p), stream_(stream) {
    ragged_ = is_ragged(backward);
    const Geometry& g = p.geometry;
    a_.walk = rows_args<T>(p, ChunkMode());
    a_.width = uint32_t(g.length);
    a_.columns = uint32_t(g.inner * g.length);
    a_.tiles = uint32_t(ceil_div(a_.columns, kTileColumns<T>));
    slabs_ = int64_t(a_.tiles) * g.outer;
    Demand d;
    d.groups = slabs_;
    d.chunks = g.runs * kTileChunks;
    d.chunk_bytes = N * int(sizeof(Real)) * (backward ? 3 : 1);
    d.team_register_chunks = backward ? kColumnBackwardRegister<T> : kForwardRegister<T>;
    d.largest_block = kColumnThreads;
    d.static_shared = int(sizeof(TileShared<T>)) + kColumnWarps * kGradientSums * kTileColumns<T> * int(sizeof(Real));
    chunk_bytes_ = size_t(d.chunk_bytes);
    const bool resident = a_.width == 1 && !(p.frozen && !backward);
    plan_ = resident ? choose_tile_plan(d, device, kColumnThreads, p.force) : Plan();
    if (plan_.rung == Rung::kGrid && !runs_at_once(tile_kernel(backward), tile_start(), device)) plan_ = Plan();
    Carver carver(p.workspace);
    if (plan_.rung == Rung::kGrid) {
      sync_.blocks = unsigned(plan_.blocks);
      sync_.counters = carver.take<unsigned>(plan_.teams);
      sync_.partial = carver.take<Real>(int64_t(plan_.teams) * 2 * plan_.blocks * kMaxSums * kTileColumns<T>);
    }
    place_stream(carver, device);  // beside the co-operating blocks' as well, in case the device will not have them
    if (backward) {
      a_.walk.weight_part = part_of(carver, p.grad_weight);
      a_.walk.bias_part = part_of(carver, p.grad_bias);
    }
    carved_ = carver.used();
  }

  Plan plan() const { return plan_; }
  size_t workspace() const { return carved_; }
  int forward() const { return ragged_ ? forward_as<true>() : forward_as<sizeof(T) == 8>(); }

  int backward() const {
    int e = ragged_ ? backward_as<true>() : backward_as<sizeof(T) == 8>();
    if (e == 0) e = fold(a_.walk.weight_part, p_.grad_weight);
    if (e == 0) e = fold(a_.walk.bias_part, p_.grad_bias);
    return e;
  }

 private:
  void place_stream(Carver& carver, const Device& device) {
    const int64_t most = ceil_div(p_.geometry.runs, kColumnRows);
    const int64_t wanted = ceil_div(int64_t(device.multiprocessors) * (2048 / kColumnThreads), slabs_);
    a_.splits = uint32_t(p_.force.blocks ? p_.force.blocks : wanted < most ? wanted : most);
    blocks_ = unsigned(slabs_ * a_.splits);
    if (plan_.rung != Rung::kGrid) plan_ = {Rung::kStreaming, kColumnThreads, int(a_.splits), int(slabs_), 0};
    a_.part = carver.take<Real>(int64_t(blocks_) * kMaxSums * kTileColumns<T>);
    a_.mean = carver.take<Real>(p_.geometry.groups());
    a_.sums = carver.take<Real>(p_.geometry.groups() * kMaxSums);
  }

  // Whether a chunk of some row or tensor is not 16 aligned bytes, or its noise begins within a counter.
  bool is_ragged(bool backward) const {
    bool ragged = p_.geometry.inner * p_.geometry.length % N != 0;
    const auto aligned = [&](const Strides& s, int64_t to) {
      return (p_.geometry.outer == 1 || s.outer % to == 0) && (p_.geometry.runs == 1 || s.run % to == 0);
    };
    each_operand(p_, backward, [&](const Operand& t) {
      ragged = ragged || elements_past_boundary<T>(t.data) != 0 || !aligned(t.stride, N);
    });
    return ragged || (p_.noise.on && !aligned(p_.noise.position, 4));
  }

  Real* part_of(Carver& carver, const Parameter& gradient) const {
    return gradient.data ? parameter_part<T>(carver, gradient, p_.geometry.outer, a_.columns) : nullptr;
  }
  int fold(const Real* part, const Parameter& gradient) const {
    return fold_parameter<T>(part, p_.geometry.outer, a_.columns, gradient, stream_);
  }

  using Kernel = void (*)(const ColumnsArgs<Real>);
  int round(Kernel kernel, const ColumnsArgs<Real>& a) const {
    Start s;
    s.threads = kColumnThreads;
    s.grid = blocks_;
    s.stream = stream_;
    return start(kernel, s, a);
  }
  int round(Kernel kernel, Kernel finish, const ColumnsArgs<Real>& a) const {
    if (const int e = round(kernel, a)) return e;
    Start s;
    s.threads = finish_threads(int64_t(a.width) * a.splits);
    s.grid = unsigned(p_.geometry.groups());
    s.stream = stream_;
    return start(finish, s, a);
  }

  using TileKernel = void (*)(const ColumnsArgs<Real>, typename TileTeam<T>::Sync);
  Start tile_start() const {
    Start s;
    s.threads = kColumnThreads;
    s.grid = unsigned(plan_.teams * plan_.blocks);
    s.shared = size_t(plan_.shared_chunks) * chunk_bytes_ * kColumnThreads;
    s.cooperative = true;
    s.stream = stream_;
    return s;
  }
  TileKernel tile_kernel(bool backward) const {
    return ragged_ ? tile_kernel_as<true>(backward) : tile_kernel_as<sizeof(T) == 8>(backward);
  }
  template <bool kRagged>
  TileKernel tile_kernel_as(bool backward) const {
    const bool joined = joins(p_, backward);
    if (backward) return joined ? column_backward<T, kRagged, true> : column_backward<T, kRagged, false>;
    if (joined) return column_forward<T, kRagged, true, true>;
    return p_.noise.on ? column_forward<T, kRagged, true, false> : column_forward<T, kRagged, false, false>;
  }
  int start_tiles(TileKernel kernel) const {
    if (const int e = zero(sync_.counters, size_t(plan_.teams) * sizeof(unsigned), stream_)) return e;
    return start(kernel, tile_start(), a_, sync_);
  }

  template <bool kRagged>
  int forward_as() const {
    int e = kNotAtOnce;
    if (plan_.rung == Rung::kGrid) e = start_tiles(tile_kernel(false));
    if (e != kNotAtOnce) return e;
    e = 0;
    ColumnsArgs<Real> a = a_;
    if (!p_.frozen) {
      const Kernel joined = column_moments<T, kRagged, true>, plain = column_moments<T, kRagged, false>;
      e = round(joins_first(p_, false) ? joined : plain, column_finish<T, Finish::kMoments>, a);
      a.walk = after_first_round(a.walk);
      if (!e) e = round(column_lambda<T, kRagged>, column_finish<T, Finish::kLambda>, a);
    }
    if (!e && p_.noise.on && !p_.noise.given_scale) {
      e = round(column_sum_x<T, kRagged, false>, column_finish<T, Finish::kMean>, a);
      if (!e) e = round(column_sum_x<T, kRagged, true>, column_finish<T, Finish::kDeviation>, a);
    }
    if (e) return e;
    if (joins_last(p_, false)) return round(column_output<T, kRagged, true, true>, a);
    return round(p_.noise.on ? column_output<T, kRagged, true, false> : column_output<T, kRagged, false, false>, a);
  }

  template <bool kRagged>
  int backward_as() const {
    int e = kNotAtOnce;
    if (plan_.rung == Rung::kGrid) e = start_tiles(tile_kernel(true));
    if (e != kNotAtOnce) return e;
    const Kernel sums = gradient_kernel<kRagged, true>(joins_first(p_, true));
    e = round(sums, column_finish<T, Finish::kGradient>, a_);
    if (e || !p_.output.data) return e;
    return round(gradient_kernel<kRagged, false>(joins_last(p_, true)), a_);
  }
  template <bool kRagged, bool kSums>
  static Kernel gradient_kernel(bool joined) {
    return joined ? column_gradient<T, kRagged, kSums, true> : column_gradient<T, kRagged, kSums, false>;
  }

  const Problem& p_;
  ColumnsArgs<Real> a_ = {};
  void* stream_;
  bool ragged_ = false;
  Plan plan_;
  typename TileTeam<T>::Sync sync_ = {};
  int64_t slabs_ = 1;
  size_t chunk_bytes_ = 0;
  unsigned blocks_ = 1;
  size_t carved_ = 0;
};

}  // namespace
}  // namespace cuda
}  // namespace normnorm
