// The rows walk for groups that fit nowhere on chip: a launch a round, each reading the tensors again, each group
// shared out over as many blocks as fill the device. Between the rounds a small launch adds up the blocks' sums.
#pragma once

#include "rounds.cuh"
#include "rows.cuh"
#include "rows_backward.cuh"
#include "rows_forward.cuh"
#include "team.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kStreamThreads = 256;

template <class Real>
struct StreamArgs {
  RowsArgs<Real> rows;
  uint32_t first_group, splits;  // of a wave; blocks a group
  Real* part;                    // [group of the wave][split][kMaxSums]
  Real* mean;                    // [group of the wave]: mean of x, between rounds 3 and 4
  Real* sums;                    // [group of the wave][kMaxSums]: backward totals
};

// A block's group, and its share of the group's chunks.
struct Slice {
  uint32_t local, group, split;
};
template <class Real>
__device__ inline Slice locate_slice(const StreamArgs<Real>& s) {
  const uint32_t local = blockIdx.x / s.splits;
  return {local, s.first_group + local, blockIdx.x - local * s.splits};
}

// f(i, raw) for i = first, first + step ... below end, where load(i, raw) asks for what f needs from memory: kAhead times
// before the first f waits.
template <class Raw, int kAhead, class Load, class F>
__device__ __forceinline__ void each_ahead(uint32_t first, uint32_t end, uint32_t step, Load load, F f) {
#pragma unroll 1
  for (uint32_t i = first; i < end; i += kAhead * step) {
    Raw raw[kAhead];
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k)
      if (i + k * step < end) load(i + k * step, raw[k]);
#pragma unroll
    for (uint32_t k = 0; k < kAhead; ++k) {
      if (i + k * step >= end) break;
      f(i + k * step, raw[k]);
    }
  }
}

constexpr int kStreamAhead = 2;
constexpr int kJoinedGradientAhead = 1;  // of three or four tensors, for which there are registers in two blocks

// f(chunk's place, raw) over a block's chunks; load(chunk's place, raw).
template <bool kRagged, int N, class Raw, int kAhead = kStreamAhead, class Real, class Load, class F>
__device__ __forceinline__ void each_chunk(const StreamArgs<Real>& s, const GroupPlace& g, uint32_t split, Load load, F f) {
  each_ahead<Raw, kAhead>(
      split * blockDim.x + threadIdx.x, s.rows.chunks, s.splits * blockDim.x,
      [&](uint32_t chunk, Raw& raw) { load(locate_chunk<kRagged, N>(s.rows, g, chunk), raw); },
      [&](uint32_t chunk, const Raw& raw) { f(locate_chunk<kRagged, N>(s.rows, g, chunk), raw); });
}

// The same where only the input is read, and in joined kernels a tensor beside it: f(chunk's place, values, what was
// fetched of `beside`).
template <class T, bool kRagged, bool kJoined, class Real, class F>
__device__ __forceinline__ void each_input(const StreamArgs<Real>& s, const GroupPlace& g, uint32_t split,
                                           const JoinedTensor& beside, F f) {
  constexpr int N = kChunkOf<T>;
  struct Raw {
    Fetched<T, kRagged> u;
    Extra<T, kJoined, kRagged> beside;
  };
  const RowsArgs<Real>& a = s.rows;
  const auto load = [&](const ChunkPlace& c, Raw& raw) {
    fetch<T, kRagged>(a.input, g.input, a.at_input, c, raw.u);
    fetch_joined<kJoined>(ChunkAt<T, kRagged>{g, c}, beside, raw.beside);
  };
  each_chunk<kRagged, N, Raw>(s, g, split, load, [&](const ChunkPlace& c, const Raw& raw) {
    Real u[N];
    values<T, kRagged>(a.input, g.input, a.at_input, c, raw.u, u);
    f(c, u, raw.beside);
  });
}
template <class T, bool kRagged, class Real, class F>
__device__ __forceinline__ void each_input(const StreamArgs<Real>& s, const GroupPlace& g, uint32_t split, F f) {
  each_input<T, kRagged, false>(s, g, split, s.rows.joined.addend,
                                [&](const ChunkPlace& c, Real (&u)[kChunkOf<T>], const Fetched<T, true>&) { f(c, u); });
}

template <int K, class Real>
__device__ inline void write_part(const StreamArgs<Real>& s, const Slice& slice, Real (&sums)[K]) {
  BlockTeam<Real> team({});
  team.sum(sums);
  if (threadIdx.x > 0) return;
  Real* part = s.part + (size_t(slice.local) * s.splits + slice.split) * kMaxSums;
#pragma unroll
  for (int k = 0; k < K; ++k) part[k] = sums[k];
}

// Round 1. Each block sums around a pilot of its own, the mean of the first chunks it reads, so that an offset of the
// data does not cancel digits; leaves (count, pilot, mean less the pilot, sum of squares around the mean). Joined, it
// writes the sum, which the other rounds read as their input.
template <class T, bool kRagged, bool kJoined>
__global__ void __launch_bounds__(kStreamThreads) stream_moments(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice(s);
  const GroupPlace g = locate_group(s.rows, slice.group);
  BlockTeam<Real> team({});
  Real pilot[2] = {0, 0};
  const uint32_t first = slice.split * blockDim.x + threadIdx.x;
  if (first < s.rows.chunks) {
    const ChunkPlace c = locate_chunk<kRagged, N>(s.rows, g, first);
    Real u[N];
    read_chunk<T, kRagged>(s.rows.input, g.input, s.rows.at_input, c, u);
    join_addend<T, kJoined>(ChunkAt<T, kRagged>{g, c}, s.rows.joined, Fetched<T, true>(), u);
#pragma unroll
    for (int j = 0; j < N; ++j) pilot[0] += u[j];
    pilot[1] = c.span.hi > c.span.lo ? Real(c.span.hi - c.span.lo) : Real(0);
  }
  team.sum(pilot);
  const Real centre = pilot[1] > Real(0) ? pilot[0] / pilot[1] : Real(0);
  Real sums[3] = {0, 0, 0};
  const auto add = [&](const ChunkPlace& c, Real (&u)[N], const Extra<T, kJoined, kRagged>& addend) {
    keep_sum<T, kJoined>(ChunkAt<T, kRagged>{g, c}, s.rows.joined, addend, u);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Real d = !kRagged || c.span.has(j) ? u[j] - centre : Real(0);
      sums[1] += d;
      sums[2] += d * d;
    }
    sums[0] += c.span.hi > c.span.lo ? Real(c.span.hi - c.span.lo) : Real(0);
  };
  each_input<T, kRagged, kJoined>(s, g, slice.split, s.rows.joined.addend, add);
  team.sum(sums);
  if (threadIdx.x > 0) return;
  Real* part = s.part + (size_t(slice.local) * s.splits + slice.split) * kMaxSums;
  const Real shift = sums[0] > Real(0) ? sums[1] / sums[0] : Real(0);
  part[0] = sums[0];
  part[1] = centre;
  part[2] = shift;
  part[3] = sums[2] - sums[1] * shift;
}

// Round 2, from the moments in the statistics.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) stream_lambda(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice(s);
  const GroupPlace g = locate_group(s.rows, slice.group);
  const auto row = [&](StatRow r) { return s.rows.stats[int64_t(r) * s.rows.groups + slice.group]; };
  const Moments1<Real> m = {row(kMean), row(kMeanLow), row(kRstd)};
  LambdaSums<Real> terms;
  each_input<T, kRagged>(s, g, slice.split, [&](const ChunkPlace& c, const Real (&u)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) terms.add(!kRagged || c.span.has(j) ? m.standardize(u[j] - m.mean) : Real(0));
  });
  Real sums[4];
  terms.totals(sums);
  write_part(s, slice, sums);
}

// x of a chunk in place of u, from the statistics.
template <PrecisionPath kPath, int N, class Real>
__device__ __forceinline__ void input_to_x(const GroupConstants<Real>& k, Real (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Real h = k.standardize(x[j]);
    x[j] = signed_as(DeviceLog<Real>::of(absolute(h)), h);
  }
  transform_chunk<kPath>(x, k.exponents);
}

template <class Real>
__device__ inline GroupConstants<Real> constants_of(const RowsArgs<Real>& a, uint32_t group) {
  return load_constants(a.stats, group, a.groups, a.alpha, a.order, a.transform_eps, a.frozen);
}

// Rounds 3 and 4: sums x, or |x - mean|.
template <class T, bool kRagged, bool kDeviation>
__global__ void __launch_bounds__(kStreamThreads) stream_x(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice(s);
  const GroupPlace g = locate_group(s.rows, slice.group);
  const GroupConstants<Real> k = constants_of(s.rows, slice.group);
  const Real mean = kDeviation ? s.mean[slice.local] : Real(0);
  Real sums[1] = {0};
  with_path(k.path, [&](auto tag) {
    each_input<T, kRagged>(s, g, slice.split, [&](const ChunkPlace& c, Real (&x)[N]) {
      input_to_x<tag.value>(k, x);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Real term = kDeviation ? absolute(x[j] - mean) : x[j];
        sums[0] += !kRagged || c.span.has(j) ? term : Real(0);
      }
    });
  });
  write_part(s, slice, sums);
}

// Round 5; also the whole of a frozen layer's forward pass.
template <class T, bool kRagged, bool kNoise, bool kJoined>
__global__ void __launch_bounds__(kStreamThreads) stream_output(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice(s);
  const GroupPlace g = locate_group(s.rows, slice.group);
  const GroupConstants<Real> k = constants_of(s.rows, slice.group);
  const PhiloxSchedule keys(draws_noise<kNoise, kJoined>(s.rows) ? uint64_t(*s.rows.seed) : 0);
  const GroupAffine<Real> affine = group_affine<T>(s.rows, g);
  const Real noise = s.rows.noise_train * k.noise_scale * kNormalUnit<Real>;
  with_any_path(k.path, [&](auto tag) {
    const auto write = [&](const ChunkPlace& c, Real (&x)[N], const Extra<T, kJoined, kRagged>& residual) {
      input_to_x<tag.value>(k, x);
      output_round<T, kRagged, kNoise, kJoined>(s.rows, g, c, keys, noise, affine, residual, x);
    };
    each_input<T, kRagged, kJoined>(s, g, slice.split, s.rows.joined.residual, write);
  });
}

// The backward reduction, and the gradient of the input from its totals.
template <class T, bool kRagged, bool kSums, bool kJoined>
__global__ void __launch_bounds__(kStreamThreads, kJoined ? 2 : 3) stream_gradient(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  using At = ChunkAt<T, kRagged>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice(s);
  const GroupPlace g = locate_group(s.rows, slice.group);
  const GroupConstants<Real> k = constants_of(s.rows, slice.group);
  const bool noisy = s.rows.noise && s.rows.weight_part != nullptr;
  const PhiloxSchedule keys(kSums && noisy ? uint64_t(*s.rows.seed) : 0);
  const Real noise = s.rows.noise_train * k.noise_scale * (kNormalUnit<Real> / DeviceLog<Real>::kUnit);
  InputGradient<Real> du = {};
  if (!kSums)
    du = finish_gradient(s.sums + size_t(slice.local) * kMaxSums, group_affine<T>(s.rows, g).weight, s.rows.inverse_count,
                         k.rstd, s.rows.frozen);
  Real sums[kGradientSums] = {};
  const SignedExponent<Real> exponent = gradient_exponent(k.exponents);
  with_path(k.path, [&](auto tag) {
    struct Raw {
      Fetched<T, kRagged> u, grad;
      Extra<T, kJoined, kRagged> activated;
      Extra<T, kJoined && !kSums, kRagged> grad_sum;
    };
    const auto load = [&](const ChunkPlace& c, Raw& raw) {
      const At at = {g, c};
      fetch<T, kRagged>(s.rows.input, g.input, s.rows.at_input, c, raw.u);
      fetch<T, kRagged>(s.rows.grad, g.grad, s.rows.at_grad, c, raw.grad);
      fetch_mask<kJoined>(at, s.rows.joined.activated, raw.activated);
      fetch_joined<kJoined && !kSums>(at, s.rows.joined.grad_sum, raw.grad_sum);
    };
    constexpr int kAhead = kJoined ? kJoinedGradientAhead : kStreamAhead;
    each_chunk<kRagged, N, Raw, kAhead>(s, g, slice.split, load, [&](const ChunkPlace& c, const Raw& raw) {
      Real u[N], grad[N], weighted[N], x[N];
      values<T, kRagged>(s.rows.input, g.input, s.rows.at_input, c, raw.u, u);
      values<T, kRagged>(s.rows.grad, g.grad, s.rows.at_grad, c, raw.grad, grad);
      join_mask<kJoined>(At{g, c}, s.rows.joined, raw.activated, grad);
      weighted_gradient<T, kRagged>(s.rows, g, c, grad, weighted);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Real h = k.standardize(u[j]);
        x[j] = Real(0);
        if (kRagged && !c.span.has(j)) continue;
        const Slopes<Real> slope = gradient_round(tag.value, h, weighted[j], exponent, k.exponents, k.lmbda, sums);
        x[j] = slope.x;
        u[j] = du(slope.through_h, slope.w, h);
      }
      if constexpr (!kSums) {
        join_sum_gradient<kJoined>(At{g, c}, s.rows.joined, raw.grad_sum, u);
        write_chunk<T, kRagged>(s.rows.output, g.output, s.rows.at_output, c, u);
      } else {
        if (noisy) add_noise<kRagged>(s.rows, g, c, keys, noise, x);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[5] += grad[j], sums[6] += grad[j] * x[j];
      }
    });
  });
  if constexpr (kSums) natural_sums(sums);
  if constexpr (kSums) write_part(s, slice, sums);
}

enum class Finish { kMoments, kLambda, kMean, kDeviation, kGradient };

// A block finishes a group: as many threads as there are parts, within limits.
constexpr int kFinishThreads = 256;
inline unsigned finish_threads(int64_t parts) {
  const int64_t whole = ceil_div(parts, 32) * 32;
  return unsigned(whole < kFinishThreads ? whole : kFinishThreads);
}

// What a block makes of the moments of a group's parts: around the first part's pilot, so that nothing cancels.
// part(i, k) is number k of part i: count, pilot, mean less the pilot, sum of squares around the mean.
template <class Real, class Part>
__device__ inline void finish_moment_parts(const RowsArgs<Real>& a, BlockTeam<Real>& team, uint32_t parts, Part part,
                                           uint32_t group) {
  const Real pilot = part(0, 1);
  Real sums[2] = {};
  for (uint32_t i = threadIdx.x; i < parts; i += blockDim.x) {
    const Real count = part(i, 0), delta = (part(i, 1) - pilot) + part(i, 2);
    sums[0] += count * delta;
    sums[1] += part(i, 3) + count * delta * delta;
  }
  team.sum(sums);
  const Real shift = sums[0] * a.inverse_count, squares = sums[1];
  const Real mean = pilot + shift;
  // shift = mean of u - pilot: finish_moments() takes its square out of the variance
  const Moments1<Real> m = finish_moments(mean, shift / a.inverse_count, squares, a.inverse_count, a.eps);
  if (threadIdx.x > 0) return;
  Real* stats = a.stats + group;
  stats[int64_t(kMean) * a.groups] = mean;
  stats[int64_t(kMeanLow) * a.groups] = shift - (mean - pilot);
  stats[int64_t(kRstd) * a.groups] = m.rstd;
}

// What one thread makes of a group's totals.
template <Finish kFinish, int K, class Real>
__device__ inline void finish_sums(const RowsArgs<Real>& a, const Real (&sums)[K], uint32_t group, Real* mean,
                                   Real* totals) {
  Real* stats = a.stats + group;
  const int64_t groups = a.groups;
  if constexpr (kFinish == Finish::kLambda) {
    const Estimate<Real> e = finish_lambda(sums, stats[kRstd * groups], a.inverse_count, a.alpha, a.order, a.eps, a.root_eps);
    stats[kLmbda * groups] = e.lmbda;
    stats[kMeanHd * groups] = e.mean_hd;
    stats[kMeanD * groups] = e.mean_d;
    stats[kCurvature * groups] = e.curvature;
    if (!a.given_scale) stats[kNoiseScale * groups] = Real(0);
  } else if constexpr (kFinish == Finish::kMean) {
    *mean = sums[0] * a.inverse_count;
  } else if constexpr (kFinish == Finish::kDeviation) {
    stats[kNoiseScale * groups] = sums[0] * a.inverse_count;
  } else {
#pragma unroll
    for (int k = 0; k < K; ++k) totals[k] = sums[k];
  }
}

template <class T, Finish kFinish>
__global__ void __launch_bounds__(kFinishThreads) stream_finish(const StreamArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  BlockTeam<Real> team({});
  const uint32_t local = blockIdx.x, group = s.first_group + local;
  const Real* part = s.part + size_t(local) * s.splits * kMaxSums;
  if constexpr (kFinish == Finish::kMoments) {
    const auto number = [&](uint32_t i, int k) { return part[size_t(i) * kMaxSums + k]; };
    finish_moment_parts(s.rows, team, s.splits, number, group);
  } else {
    constexpr int K = kFinish == Finish::kLambda ? 4 : kFinish == Finish::kGradient ? kGradientSums : 1;
    Real sums[K] = {};
    for (uint32_t i = threadIdx.x; i < s.splits; i += blockDim.x)
#pragma unroll
      for (int k = 0; k < K; ++k) sums[k] += part[size_t(i) * kMaxSums + k];
    team.sum(sums);
    if (threadIdx.x > 0) return;
    finish_sums<kFinish>(s.rows, sums, group, s.mean + local, s.sums + size_t(local) * kMaxSums);
    if constexpr (kFinish == Finish::kGradient) {
      if (s.rows.affine != Affine::kPerGroup) return;
      if (s.rows.bias_part) s.rows.bias_part[group] = sums[5];
      if (s.rows.weight_part) s.rows.weight_part[group] = sums[6];
    }
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
