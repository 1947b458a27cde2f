// Launching the rows walk: from a problem to a plan, a workspace and kernel arguments.
#pragma once

#include <cmath>

#include "parts.cuh"
#include "rows_backward.cuh"
#include "rows_forward.cuh"
#include "start.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Deals out the workspace; with a null base it only counts.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(U) + 15) / 16 * 16;
    return base_ ? reinterpret_cast<U*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// How chunks lie in a problem's tensors (rows.cuh).
struct ChunkMode {
  bool ragged = true, wide = false;
  Strides origin;
  int64_t base = 0;
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

// Whether 32 bits count a group's elements by `unit`, from the start of its first run to the end of its last.
inline bool counts_in_32_bits(const Geometry& g, const Strides& s, int64_t unit) {
  return ((g.runs - 1) * s.run + g.length) / unit < int64_t(1) << 32;
}

// f(tensor) for all that a pass reads and writes; only some of a pass's tensors are there.
template <class F>
void each_operand(const Problem& p, bool backward, F f) {
  const auto given = [&](const Operand& t) {
    if (t.data) f(t);
  };
  f(p.input);
  given(p.output);
  if (backward) {
    f(p.grad_output);
    if (p.relu) given(p.activated);
    given(p.grad_sum);
  } else {
    given(p.residual);
    given(p.addend);
    if (p.addend.data) f(p.sum);
  }
}

// Whether a pass joins anything to itself where it is first to read a group, and where it is last to.
inline bool joins_first(const Problem& p, bool backward) { return backward ? p.relu : p.addend.data != nullptr; }
inline bool joins_last(const Problem& p, bool backward) {
  return p.relu || (backward ? p.grad_sum.data : p.residual.data);
}
inline bool joins(const Problem& p, bool backward) { return joins_first(p, backward) || joins_last(p, backward); }

// Where all tensors agree about chunk boundaries in memory, and the noise has none of its counters across one.
template <class T>
ChunkMode chunk_mode(const Problem& p, bool backward) {
  constexpr int N = kChunkOf<T>;
  const int64_t base = elements_past_boundary<T>(p.input.data);
  ChunkMode m;
  m.wide = sizeof(T) < 8;
  each_operand(p, backward, [&](const Operand& t) {
    m.wide = m.wide && elements_past_boundary<T>(t.data) == base && congruent(p, t.stride, p.input.stride, N);
  });
  if (p.noise.on) m.wide = m.wide && base % 4 == 0 && congruent(p, p.noise.position, p.input.stride, 4);
  m.origin = m.wide ? p.input.stride : p.noise.position;
  m.base = m.wide ? base : 0;
  const bool parameters_aligned = p.affine != Affine::kPerElement || (reinterpret_cast<uintptr_t>(p.weight.data) % 16 == 0 &&
                                                                      reinterpret_cast<uintptr_t>(p.bias.data) % 16 == 0);
  m.ragged = !m.wide || base != 0 || p.geometry.length % N != 0 || !congruent(p, m.origin, Strides(), N) ||
             !parameters_aligned;
  each_operand(p, backward, [&](const Operand& t) {
    m.ragged = m.ragged || !counts_in_32_bits(p.geometry, t.stride, N);
  });
  m.ragged = m.ragged || !counts_in_32_bits(p.geometry, p.noise.position, 4);
  return m;
}

// A tensor's walk; `unit` elements are counted as one.
inline Walk walk_of(const Geometry& g, const Strides& s, int64_t unit) {
  Walk w;
  static_cast<Strides&>(w) = s;
  w.gap = uint32_t(s.run / unit - g.length / unit);
  return w;
}

inline JoinedTensor joined_tensor(const Geometry& g, const Operand& t, int64_t unit) {
  return {t.data, walk_of(g, t.stride, unit)};
}

template <class T>
RowsArgs<RealOf<T>> rows_args(const Problem& p, const ChunkMode& mode) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  RowsArgs<Real> a = {};
  const int64_t per_run = mode.ragged ? ceil_div(p.geometry.length + N - 1, N) : p.geometry.length / N;
  a.length = p.geometry.length;
  a.groups = uint32_t(p.geometry.groups());
  a.runs = uint32_t(p.geometry.runs);
  a.inner = FastDivide(uint32_t(p.geometry.inner));
  a.chunks_per_run = p.geometry.runs == 1 ? FastDivide::always_zero(uint32_t(per_run)) : FastDivide(uint32_t(per_run));
  a.chunks = uint32_t(per_run * p.geometry.runs);
  a.wide = mode.wide;
  a.input = p.input.data, a.grad = p.grad_output.data, a.output = p.output.data;
  a.at_input = walk_of(p.geometry, p.input.stride, N);
  a.at_grad = walk_of(p.geometry, p.grad_output.stride, N);
  a.at_output = walk_of(p.geometry, p.output.stride, N);
  a.at_noise = walk_of(p.geometry, p.noise.position, 4);
  a.chunk_origin = mode.origin, a.chunk_base = mode.base;
  a.stats = static_cast<Real*>(p.stats);
  a.weight = p.weight.data, a.weight_in_storage = p.weight.in_storage_type;
  a.bias = p.bias.data, a.bias_in_storage = p.bias.in_storage_type;
  a.affine = p.affine;
  a.seed = p.seed, a.stream = p.noise.stream;
  a.noise = p.noise.on, a.given_scale = p.noise.given_scale, a.frozen = p.frozen;
  a.noise_train = Real(p.noise.train);
  a.inverse_count_double = 1.0 / double(p.geometry.group_size());
  a.inverse_count = Real(a.inverse_count_double);
  a.eps = Real(p.eps), a.root_eps = Real(std::sqrt(p.eps));
  a.alpha = Real(p.alpha), a.transform_eps = Real(p.transform_eps);
  a.order = p.order;
  const auto joined = [&](const Operand& t) { return joined_tensor(p.geometry, t, N); };
  a.joined = {joined(p.residual), joined(p.addend), joined(p.sum), joined(p.relu ? p.activated : Operand()),
              joined(p.grad_sum), p.relu};
  return a;
}

// What the rounds after the first read: where there is one, the sum that it has written.
template <class Real>
RowsArgs<Real> after_first_round(RowsArgs<Real> a) {
  if (a.joined.addend.data == nullptr) return a;
  a.input = a.joined.sum.data;
  a.at_input = a.joined.sum.at;
  return a;
}

// One kernel over each kind of team.
template <class Real>
struct TeamKernels {
  void (*block)(const RowsArgs<Real>, typename BlockTeam<Real>::Sync);
  void (*cluster)(const RowsArgs<Real>, typename ClusterTeam<Real>::Sync);
  void (*grid)(const RowsArgs<Real>, typename GridTeam<Real>::Sync);
};

inline Start team_start(const Plan& plan, size_t chunk_bytes, void* stream) {
  Start s;
  s.threads = unsigned(plan.threads);
  s.grid = unsigned(plan.teams * plan.blocks);
  s.shared = size_t(plan.shared_chunks) * chunk_bytes * size_t(plan.threads);
  s.stream = stream;
  if (plan.rung == Rung::kCluster) s.cluster = plan.blocks;
  s.cooperative = plan.rung == Rung::kGrid;
  return s;
}

// Whether blocks that wait for one another would run at the same time.
template <class Real>
bool team_runs_at_once(const TeamKernels<Real>& kernels, const Plan& plan, size_t chunk_bytes, const Device& device) {
  const Start s = team_start(plan, chunk_bytes, nullptr);
  return s.cooperative ? runs_at_once(kernels.grid, s, device) : runs_at_once(kernels.cluster, s, device);
}

template <class Real>
int start_team(const TeamKernels<Real>& kernels, const Plan& plan, size_t chunk_bytes, const RowsArgs<Real>& a,
               const typename GridTeam<Real>::Sync& sync, void* stream) {
  const Start s = team_start(plan, chunk_bytes, stream);
  if (plan.rung == Rung::kBlock) return start(kernels.block, s, a, typename BlockTeam<Real>::Sync());
  if (plan.rung == Rung::kCluster) return start(kernels.cluster, s, a, typename ClusterTeam<Real>::Sync());
  if (const int e = zero(sync.counters, size_t(plan.teams) * sizeof(unsigned), stream)) return e;
  return start(kernels.grid, s, a, sync);
}

// Where `parts` partial gradients of a parameter's elements go; one part alone is the gradient itself where the types agree.
template <class T>
RealOf<T>* parameter_part(Carver& carver, const Parameter& gradient, int64_t parts, int64_t elements) {
  using Real = RealOf<T>;
  if (parts == 1 && (!gradient.in_storage_type || sizeof(T) == sizeof(Real))) return static_cast<Real*>(gradient.data);
  Real* part = carver.take<Real>(parts * elements);
  static Real counted;  // while the workspace is only counted, not null all the same: the sums are wanted
  return part ? part : &counted;
}

template <class T>
int fold_parameter(const RealOf<T>* part, int64_t parts, int64_t elements, const Parameter& gradient, void* stream) {
  if (gradient.data == nullptr || part == gradient.data) return 0;
  Start s;
  s.threads = kFoldColumns * kFoldRows;
  s.grid = unsigned(ceil_div(elements, kFoldColumns));
  s.stream = stream;
  return start(fold_parts<T>, s, part, parts, elements, gradient.data, gradient.in_storage_type);
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
