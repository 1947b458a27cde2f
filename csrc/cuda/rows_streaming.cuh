// The rows layout, streaming: groups that fit nowhere on chip. Each round is a launch that reads the tensors again, with a
// group divided among as many blocks as fill the device; a small launch after it adds up the blocks' partial sums. Every
// other round goes from the last block and chunk to the first: L2 holds what the round before has read last.
#pragma once

#include "rows_resident.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kStreamThreads = 256;

template <class Real>
struct StreamingArgs : KernelArgs<Real> {
  uint32_t splits;  // blocks a group
  Real* partial;    // [group][split][kMaxSums]
  Real* mean;       // [group]: mean of x, between rounds 3 and 4
  Real* sums;       // [group][kMaxSums]: backward totals, which include the weight
};

// A block's group, and which of the group's blocks it is.
struct Slice {
  uint32_t group, split;
};
template <bool kReversed, class Real>
__device__ inline Slice locate_slice(const StreamingArgs<Real>& s) {
  const uint32_t block = kReversed ? s.groups * s.splits - 1 - blockIdx.x : blockIdx.x, group = block / s.splits;
  return {group, block - group * s.splits};
}

// Chunks of one tensor, of the backward pass's two, and of the two to four of fused kernels: rings of 16 to 32 KB a block.
constexpr int kStreamAhead = 3, kGradientAhead = 2, kFusedStreamAhead = 1;

// f(chunk's place, raw) over a block's chunks; load(chunk's place, raw).
template <bool kRagged, bool kReversed, int N, class Raw, int kAhead, class Real, class Load, class F>
__device__ __forceinline__ void each_chunk(const StreamingArgs<Real>& s, const GroupPlace& g, uint32_t split, Load load,
                                           F f) {
  const uint32_t first = split * blockDim.x + threadIdx.x, step = s.splits * blockDim.x;
  each_ahead<Raw, kStreamThreads, kAhead>(
      kReversed ? s.chunks - 1 - first : first, s.chunks, kReversed ? 0 - step : step,  // below 0 is above s.chunks
      [&](uint32_t chunk, Raw& raw) { load(locate_chunk<kRagged, N>(s, g, chunk), raw); },
      [&](uint32_t chunk, const Raw& raw) { f(locate_chunk<kRagged, N>(s, g, chunk), raw); });
}

// The same over the input, and in fused kernels one tensor `beside` it: f(chunk's place, values, what was fetched of
// `beside`).
template <class T, bool kRagged, bool kReversed, bool kFused, class Real, class F>
__device__ __forceinline__ void each_input(const StreamingArgs<Real>& s, const GroupPlace& g, uint32_t split,
                                           const FusedTensor& beside, F f) {
  constexpr int N = kChunkOf<T>;
  using Raw = InputFetch<T, kFused, kRagged, InShared>;
  const auto load = [&](const ChunkPlace& c, Raw& raw) {
    fetch<T, kRagged>(s.input, g.input, s.at_input, c, raw.u);
    fetch_fused<kFused>(ChunkAt<T, kRagged>{g, c}, beside, raw.beside);
  };
  constexpr int kAhead = kFused ? kFusedStreamAhead : kStreamAhead;
  each_chunk<kRagged, kReversed, N, Raw, kAhead>(s, g, split, load, [&](const ChunkPlace& c, const Raw& raw) {
    Real u[N];
    values<T, kRagged>(s.input, g.input, s.at_input, c, raw.u, u);
    f(c, u, raw.beside);
  });
}
template <class T, bool kRagged, bool kReversed, class Real, class F>
__device__ __forceinline__ void each_input(const StreamingArgs<Real>& s, const GroupPlace& g, uint32_t split, F f) {
  using Nothing = FusedFetch<T, false, kRagged, InShared>;
  each_input<T, kRagged, kReversed, false>(
      s, g, split, s.fused.addend, [&](const ChunkPlace& c, Real (&u)[kChunkOf<T>], const Nothing&) { f(c, u); });
}

template <int K, class Real>
__device__ inline void write_partial(const StreamingArgs<Real>& s, const Slice& slice, Real (&sums)[K]) {
  BlockThreads<Real> threads({});
  threads.sum(sums);
  if (threadIdx.x > 0) return;
  Real* partial = s.partial + (size_t(slice.group) * s.splits + slice.split) * kMaxSums;
#pragma unroll
  for (int k = 0; k < K; ++k) partial[k] = sums[k];
}

// Round 1. Each block sums around its own pilot, the mean of the first chunks it reads, so that an offset of the data costs
// no precision. Partial: (count, pilot, mean less the pilot, sum of squares around the mean). Fused, it also writes the sum
// of input and addend, which the other rounds read as their input.
template <class T, bool kRagged, bool kFused>
__global__ void __launch_bounds__(kStreamThreads) stream_moments(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice<false>(s);
  const GroupPlace g = locate_group(s, slice.group);
  BlockThreads<Real> threads({});
  Real pilot[2] = {0, 0};
  const uint32_t first = slice.split * blockDim.x + threadIdx.x;
  if (first < s.chunks) {
    const ChunkPlace c = locate_chunk<kRagged, N>(s, g, first);
    Real u[N];
    read_chunk<T, kRagged>(s.input, g.input, s.at_input, c, u);
    add_addend<T, kFused>(ChunkAt<T, kRagged>{g, c}, s.fused, Fetched<T, true>(), u);
#pragma unroll
    for (int j = 0; j < N; ++j) pilot[0] += u[j];
    pilot[1] = c.span.hi > c.span.lo ? Real(c.span.hi - c.span.lo) : Real(0);
  }
  threads.sum(pilot);
  const Real centre = pilot[1] > Real(0) ? pilot[0] / pilot[1] : Real(0);
  Real sums[3] = {0, 0, 0};
  const auto add = [&](const ChunkPlace& c, Real (&u)[N], const FusedFetch<T, kFused, kRagged, InShared>& addend) {
    add_and_write_sum<T, kFused>(ChunkAt<T, kRagged>{g, c}, s.fused, addend, u);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Real d = !kRagged || c.span.has(j) ? u[j] - centre : Real(0);
      sums[1] += d;
      sums[2] += d * d;
    }
    sums[0] += c.span.hi > c.span.lo ? Real(c.span.hi - c.span.lo) : Real(0);
  };
  each_input<T, kRagged, false, kFused>(s, g, slice.split, s.fused.addend, add);
  threads.sum(sums);
  if (threadIdx.x > 0) return;
  Real* partial = s.partial + (size_t(slice.group) * s.splits + slice.split) * kMaxSums;
  const Real shift = sums[0] > Real(0) ? sums[1] / sums[0] : Real(0);
  partial[0] = sums[0];
  partial[1] = centre;
  partial[2] = shift;
  partial[3] = sums[2] - sums[1] * shift;
}

// Round 2, from the moments in the statistics.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) stream_lambda(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice<true>(s);
  const GroupPlace g = locate_group(s, slice.group);
  const auto row = [&](StatRow r) { return s.stats[int64_t(r) * s.groups + slice.group]; };
  const Moments1<Real> m = {row(kMean), row(kMeanLow), row(kRstd)};
  LambdaSums<Real> terms;
  each_input<T, kRagged, true>(s, g, slice.split, [&](const ChunkPlace& c, const Real (&u)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      add_lambda_terms(terms, !kRagged || c.span.has(j) ? m.standardize(u[j] - m.mean) : Real(0));
  });
  Real sums[4];
  lambda_totals(terms, sums);
  write_partial(s, slice, sums);
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
__device__ inline GroupConstants<Real> constants_of(const KernelArgs<Real>& a, uint32_t group) {
  return load_constants(a.stats, group, a.groups, a.settings, a.frozen);
}

// Rounds 3 and 4: sums x, or |x - mean|.
template <class T, bool kRagged, bool kDeviation>
__global__ void __launch_bounds__(kStreamThreads) stream_x(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice<kDeviation>(s);
  const GroupPlace g = locate_group(s, slice.group);
  const GroupConstants<Real> k = constants_of(s, slice.group);
  const Real mean = kDeviation ? s.mean[slice.group] : Real(0);
  Real sums[1] = {0};
  with_path(k.path, [&](auto tag) {
    each_input<T, kRagged, kDeviation>(s, g, slice.split, [&](const ChunkPlace& c, Real (&x)[N]) {
      input_to_x<tag.value>(k, x);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Real term = kDeviation ? absolute(x[j] - mean) : x[j];
        sums[0] += !kRagged || c.span.has(j) ? term : Real(0);
      }
    });
  });
  write_partial(s, slice, sums);
}

// Round 5; the only one of a frozen layer without noise.
template <class T, bool kRagged, bool kNoise, bool kFused>
__global__ void __launch_bounds__(kStreamThreads) stream_output(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice<false>(s);
  const GroupPlace g = locate_group(s, slice.group);
  const GroupConstants<Real> k = constants_of(s, slice.group);
  const PhiloxSchedule keys(draws_noise<kNoise, kFused>(s) ? uint64_t(*s.seed) : 0);
  const GroupAffine<Real> affine = group_affine<T>(s, g);
  const Real noise = s.noise_train * k.noise_scale * kNormalUnit<Real>;
  with_any_path(k.path, [&](auto tag) {
    const auto write = [&](const ChunkPlace& c, Real (&x)[N], const FusedFetch<T, kFused, kRagged, InShared>& residual) {
      input_to_x<tag.value>(k, x);
      output_round<T, kRagged, kNoise, kFused>(s, g, c, keys, noise, affine, residual, x);
    };
    each_input<T, kRagged, false, kFused>(s, g, slice.split, s.fused.residual, write);
  });
}

// kSums: the backward reduction; else the gradient of the input from its totals.
template <class T, bool kRagged, bool kSums, bool kFused>
__global__ void __launch_bounds__(kStreamThreads, kFused ? 2 : 3) stream_gradient(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  using At = ChunkAt<T, kRagged>;
  constexpr int N = kChunkOf<T>;
  const Slice slice = locate_slice<!kSums>(s);
  const GroupPlace g = locate_group(s, slice.group);
  const GroupConstants<Real> k = constants_of(s, slice.group);
  const bool noisy = s.noise && s.weight_partials != nullptr;
  const PhiloxSchedule keys(kSums && noisy ? uint64_t(*s.seed) : 0);
  const Real noise = s.noise_train * k.noise_scale * (kNormalUnit<Real> / DeviceLog<Real>::kUnit);
  InputGradient<Real> du = {};
  if (!kSums) {
    du = finish_gradient(s.sums + size_t(slice.group) * kMaxSums, Real(1), s.inverse_count, k.rstd, s.frozen);
    du.through *= group_affine<T>(s, g).weight;
  }
  Real sums[kGradientSums] = {};
  const SignedExponent<Real> exponent = gradient_exponent(k.exponents);
  with_path(k.path, [&](auto tag) {
    using Raw = GradientFetch<T, kFused, !kSums, kRagged, InShared>;
    const auto load = [&](const ChunkPlace& c, Raw& raw) {
      const At at = {g, c};
      fetch<T, kRagged>(s.input, g.input, s.at_input, c, raw.u);
      fetch<T, kRagged>(s.grad, g.grad, s.at_grad, c, raw.g);
      fetch_mask<kFused>(at, s.fused.activated, raw.activated);
      fetch_fused<kFused && !kSums>(at, s.fused.grad_sum, raw.grad_sum);
    };
    constexpr int kAhead = kFused ? kFusedStreamAhead : kGradientAhead;
    each_chunk<kRagged, !kSums, N, Raw, kAhead>(s, g, slice.split, load, [&](const ChunkPlace& c, const Raw& raw) {
      Real u[N], grad[N], weighted[N], x[N];
      values<T, kRagged>(s.input, g.input, s.at_input, c, raw.u, u);
      values<T, kRagged>(s.grad, g.grad, s.at_grad, c, raw.g, grad);
      mask_gradient<kFused>(At{g, c}, s.fused, raw.activated, grad);
      weighted_gradient<T, kRagged>(s, g, c, grad, weighted);
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
        add_sum_gradient<kFused>(At{g, c}, s.fused, raw.grad_sum, u);
        write_chunk<T, kRagged>(s.output, g.output, s.at_output, c, u);
      } else {
        if (noisy) add_noise<kRagged>(s, g, c, keys, noise, x);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[5] += grad[j], sums[6] += grad[j] * x[j];
      }
    });
  });
  if constexpr (kSums) natural_sums(sums);
  if constexpr (kSums) write_partial(s, slice, sums);
}

enum class Finish { kMoments, kLambda, kMean, kDeviation, kGradient };

// One block finishes a group: a thread for each partial, up to kFinishThreads.
constexpr int kFinishThreads = 256;
inline unsigned finish_threads(int64_t partials) {
  const int64_t whole = ceil_div(partials, 32) * 32;
  return unsigned(whole < kFinishThreads ? whole : kFinishThreads);
}

// Sums a group's elements and their squares around the pilot of its first partial, so that nothing cancels. partial(i, k) is
// number k of partial i: count, pilot, mean less the pilot, sum of squares around the mean.
template <class Sum, class Partial>
__device__ inline void sum_moments(BlockThreads<Sum>& threads, uint32_t partials, Partial partial, Sum pilot,
                                   Sum (&sums)[2]) {
  for (uint32_t i = threadIdx.x; i < partials; i += blockDim.x) {
    const Sum count = partial(i, 0), delta = (partial(i, 1) - pilot) + partial(i, 2);
    sums[0] += count * delta;
    sums[1] += partial(i, 3) + count * delta * delta;
  }
  threads.sum(sums);
}

template <class Real, class Partial>
__device__ inline void finish_moments_of(const KernelArgs<Real>& a, BlockThreads<Real>& threads, uint32_t partials,
                                         Partial partial, uint32_t group) {
  const Real pilot = partial(0, 1);
  Real sums[2] = {};
  sum_moments(threads, partials, partial, pilot, sums);
  const Real shift = sums[0] * a.inverse_count, squares = sums[1];
  const Real mean = pilot + shift;
  // shift = mean of u - pilot: finish_moments() subtracts its square from the variance
  const Moments1<Real> m = finish_moments(mean, shift / a.inverse_count, squares, a.inverse_count, a.settings.eps);
  if (threadIdx.x > 0) return;
  Real* stats = a.stats + group;
  stats[int64_t(kMean) * a.groups] = mean;
  stats[int64_t(kMeanLow) * a.groups] = shift - (mean - pilot);
  stats[int64_t(kRstd) * a.groups] = m.rstd;
}

// Computes a group's statistics, or keeps its totals, in one thread.
template <Finish kFinish, int K, class Real>
__device__ inline void finish_sums(const KernelArgs<Real>& a, const Real (&sums)[K], uint32_t group, Real* mean,
                                   Real* totals) {
  Real* stats = a.stats + group;
  const int64_t groups = a.groups;
  if constexpr (kFinish == Finish::kLambda) {
    const Estimate<Real> e = finish_lambda(sums, stats[kRstd * groups], a.inverse_count, a.settings);
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

// Multiplies the sums that lack a weight which is the same for the whole group (weighted_gradient()) by it.
template <class T, class Real, class Sum>
__device__ inline void weigh_sums(const KernelArgs<Real>& a, uint32_t group, Sum (&sums)[kGradientSums]) {
  const Sum weight = group_affine<T>(a, locate_group(a, group)).weight;
#pragma unroll
  for (int k = 0; k < 3; ++k) sums[k] *= weight;
}

template <class T, Finish kFinish>
__global__ void __launch_bounds__(kFinishThreads) stream_finish(const StreamingArgs<RealOf<T>> s) {
  using Real = RealOf<T>;
  BlockThreads<Real> threads({});
  const uint32_t group = blockIdx.x;
  const Real* partial = s.partial + size_t(group) * s.splits * kMaxSums;
  if constexpr (kFinish == Finish::kMoments) {
    const auto number = [&](uint32_t i, int k) { return partial[size_t(i) * kMaxSums + k]; };
    finish_moments_of(s, threads, s.splits, number, group);
  } else {
    constexpr int K = kFinish == Finish::kLambda ? 4 : kFinish == Finish::kGradient ? kGradientSums : 1;
    Real sums[K] = {};
    for (uint32_t i = threadIdx.x; i < s.splits; i += blockDim.x)
#pragma unroll
      for (int k = 0; k < K; ++k) sums[k] += partial[size_t(i) * kMaxSums + k];
    threads.sum(sums);
    if (threadIdx.x > 0) return;
    if constexpr (kFinish == Finish::kGradient) weigh_sums<T>(s, group, sums);
    finish_sums<kFinish>(s, sums, group, s.mean + group, s.sums + size_t(group) * kMaxSums);
    if constexpr (kFinish == Finish::kGradient) {
      if (s.affine != Affine::kPerGroup) return;
      if (s.bias_partials) s.bias_partials[group] = sums[5];
      if (s.weight_partials) s.weight_partials[group] = sums[6];
    }
  }
}

// Where the sums of one round go, (count, groups): PassParams::sums.
struct RoundSums {
  Round round;
  int count;
  double* sums;
};

// The sums of one round over a group's partials, in float64. weigh(sums) multiplies those of the backward pass by the
// weight.
template <class Real, class Partial, class Weigh>
__device__ inline void leave_sums(const KernelArgs<Real>& a, const RoundSums& to, uint32_t partials, Partial partial,
                                  uint32_t group, Weigh weigh) {
  BlockThreads<double> threads({});
  double sums[kGradientSums] = {};
  if (to.round == Round::kMoments) {
    const double pilot = partial(0, 1), count = double(a.length) * double(a.runs);
    double around[2] = {};
    sum_moments(threads, partials, partial, pilot, around);
    const double shift = around[0] / count;  // divided, so that the mean of equal numbers is exact
    sums[0] = pilot + shift;
    sums[1] = shift - (sums[0] - pilot);
    const double squares = around[1] - around[0] * shift;
    sums[2] = squares < 0 ? 0 : squares;
  } else {
    for (uint32_t i = threadIdx.x; i < partials; i += blockDim.x)
#pragma unroll
      for (int k = 0; k < kGradientSums; ++k)
        if (k < to.count) sums[k] += partial(i, k);
    threads.sum(sums);
  }
  if (threadIdx.x > 0) return;
  if (to.round == Round::kSums) weigh(sums);
#pragma unroll
  for (int k = 0; k < kGradientSums; ++k)
    if (k < to.count) to.sums[int64_t(k) * a.groups + group] = sums[k];
}

// In place of stream_finish() after a round alone.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) stream_leave(const StreamingArgs<RealOf<T>> s, const RoundSums to) {
  const uint32_t group = blockIdx.x;
  const RealOf<T>* partial = s.partial + size_t(group) * s.splits * kMaxSums;
  const auto number = [&](uint32_t i, int k) { return double(partial[size_t(i) * kMaxSums + k]); };
  leave_sums(s, to, s.splits, number, group, [&](double (&sums)[kGradientSums]) { weigh_sums<T>(s, group, sums); });
}

// The means that a caller gives for Round::kGradient, (5, groups), in the place of a pass's own totals.
template <class T>
__global__ void __launch_bounds__(kStreamThreads) take_means(const double* means, uint32_t groups, RealOf<T>* sums) {
  const uint32_t group = blockIdx.x * kStreamThreads + threadIdx.x;
  if (group >= groups) return;
#pragma unroll
  for (int k = 0; k < 5; ++k) sums[size_t(group) * kMaxSums + k] = RealOf<T>(means[int64_t(k) * groups + group]);
}

// The gradients of weights that vary within a group, where the main kernels do not sum them: kernels of their own over input
// and gradient, whose partials reduce_partials() adds up.

// g and g (x + noise z) of a chunk. kAligned: the chunk begins at a multiple of its
// size in the order of the noise.
template <class T, bool kRagged, bool kAligned, class Real>
__device__ __forceinline__ void parameter_terms(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                                const GroupConstants<Real>& k, const PhiloxSchedule& keys,
                                                Real (&grad)[kChunkOf<T>], Real (&x)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  read_chunk<T, kRagged>(a.grad, g.grad, a.at_grad, c, grad);
  mask_gradient<true>(ChunkAt<T, kRagged>{g, c}, a.fused, Fetched<T, true>(), grad);
  if (a.weight_partials == nullptr) return;
  read_chunk<T, kRagged>(a.input, g.input, a.at_input, c, x);
  with_path(k.path, [&](auto tag) { input_to_x<tag.value>(k, x); });
  if (a.noise) {
    const Real noise = a.noise_train * k.noise_scale * kNormalUnit<Real>;
    if constexpr (kAligned) {
      add_noise<kRagged>(a, g, c, keys, noise, x);
    } else {
      Real z[N];
      unaligned_normals<N>(a, g, c, keys, z);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] += noise * z[j];
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = !kRagged || c.span.has(j) ? x[j] * grad[j] : Real(0);
}

// A weight a run: one warp sums one run of one group; the partials are (outer, inner x runs).
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) run_parameters(const KernelArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const uint32_t warps = blockDim.x / 32;
  const uint64_t item = uint64_t(blockIdx.x) * warps + threadIdx.x / 32;
  if (item >= uint64_t(a.groups) * a.runs) return;
  const uint32_t group = uint32_t(item / a.runs), run = uint32_t(item - uint64_t(group) * a.runs);
  const GroupPlace g = locate_group(a, group);
  const GroupConstants<Real> k = constants_of(a, group);
  const PhiloxSchedule keys(a.noise ? uint64_t(*a.seed) : 0);
  Real weight = 0, bias = 0;
#pragma unroll 1
  for (uint32_t i = threadIdx.x % 32; i < a.chunks_per_run.divisor; i += 32) {
    Real grad[N], x[N] = {};
    const ChunkPlace c = locate_chunk<kRagged, N>(a, g, run * a.chunks_per_run.divisor + i);
    parameter_terms<T, kRagged, true>(a, g, c, k, keys, grad, x);
#pragma unroll
    for (int j = 0; j < N; ++j) bias += grad[j], weight += x[j];
  }
  weight = warp_sum(weight);
  bias = warp_sum(bias);
  if (threadIdx.x % 32 > 0) return;
  if (a.weight_partials) a.weight_partials[item] = weight;
  if (a.bias_partials) a.bias_partials[item] = bias;
}

// A weight an element: a thread sums the same chunk of many groups; the partials are (slabs, length). Ragged chunks differ
// between groups, so here a chunk begins at a multiple of its size within the run.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kStreamThreads) element_parameters_pass(const KernelArgs<RealOf<T>> a, uint32_t slabs) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const uint32_t slab = blockIdx.x % slabs, chunk = blockIdx.x / slabs * blockDim.x + threadIdx.x;
  const int64_t first = int64_t(chunk) * N;
  if (first >= a.length) return;
  const PhiloxSchedule keys(a.noise ? uint64_t(*a.seed) : 0);
  Real weight[N] = {}, bias[N] = {};
#pragma unroll 1
  for (uint32_t group = slab; group < a.groups; group += slabs) {
    const GroupPlace g = locate_group(a, group);
    const GroupConstants<Real> k = constants_of(a, group);
    const int64_t left = a.length - first;
    const ChunkPlace c = {chunk, 0, first, {0, left < N ? int(left) : N}, !kRagged};
    Real grad[N], x[N] = {};
    parameter_terms<T, kRagged, !kRagged>(a, g, c, k, keys, grad, x);
#pragma unroll
    for (int j = 0; j < N; ++j) bias[j] += grad[j], weight[j] += x[j];
  }
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if (first + j >= a.length) break;
    if (a.weight_partials) a.weight_partials[slab * a.length + first + j] = weight[j];
    if (a.bias_partials) a.bias_partials[slab * a.length + first + j] = bias[j];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
