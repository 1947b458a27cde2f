// The forward pass of the rows walk with the group resident on chip: one read and one write of device memory.
#pragma once

#include "held.cuh"
#include "rounds.cuh"
#include "rows.cuh"
#include "team.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Numbers of a group that a thread holds in registers.
template <class T>
constexpr int kForwardRegister = sizeof(T) == 8 ? 4 : 32 / kChunkOf<T>;

template <class Real>
__device__ inline void write_statistics(const RowsArgs<Real>& a, uint32_t group, const Moments1<Real>& m,
                                        const Estimate<Real>& e) {
  Real* s = a.stats + group;
  const int64_t groups = a.groups;
  s[kMean * groups] = m.mean;
  s[kMeanLow * groups] = m.mean_low;
  s[kRstd * groups] = m.rstd;
  s[kLmbda * groups] = e.lmbda;
  s[kMeanHd * groups] = e.mean_hd;
  s[kMeanD * groups] = e.mean_d;
  s[kCurvature * groups] = e.curvature;
}

// out = weight (x + noise z) + bias for one chunk, what is joined to it, and its way to memory. noise includes kNormalUnit;
// `residual` as it was fetched.
template <class T, bool kRagged, bool kNoise, bool kJoined, class Raw, class Real>
__device__ __forceinline__ void output_round(const RowsArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                             const PhiloxSchedule& keys, Real noise, GroupAffine<Real> affine,
                                             const Raw& residual, Real (&x)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if (draws_noise<kNoise, kJoined>(a)) add_noise<kRagged>(a, g, c, keys, noise, x);
  if (a.affine == Affine::kPerElement) {
    Real weight[N], bias[N];
    element_parameters<T, kRagged>(a.weight, a.weight_in_storage, Real(1), c, weight);
    element_parameters<T, kRagged>(a.bias, a.bias_in_storage, Real(0), c, bias);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = x[j] * weight[j] + bias[j];
  } else {
    if (a.affine == Affine::kPerRun) affine = run_affine<T>(a, g.inner * a.runs + c.run);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = x[j] * affine.weight + affine.bias;
  }
  join_output<kJoined>(ChunkAt<T, kRagged>{g, c}, a.joined, residual, x);
  write_chunk<T, kRagged>(a.output, g.output, a.at_output, c, x);
}

template <class T, bool kRagged, bool kNoise, class Team, int kRegister = kForwardRegister<T>, bool kJoined = false>
class ForwardGroup {
  static constexpr int N = kChunkOf<T>;
  using At = ChunkAt<T, kRagged>;
  using Real = RealOf<T>;
  using Chunk = Real (&)[1][N];

 public:
  __device__ ForwardGroup(const RowsArgs<Real>& a, Team& team)
      : a_(a), team_(team), held_(a.chunks, team.rank(), team.size()) {}

  // Each thread sums around a pilot of its own, the mean of its first chunk, so that an offset of the data costs no
  // digits. Leaves u minus the pilot.
  __device__ __forceinline__ Moments1<Real> moments(const GroupPlace& g) {
    Real pilot = 0, sum = 0, squares = 0, count = 0;
    struct Raw {
      Fetched<T, kRagged> u;
      Extra<T, kJoined, kRagged> addend;
    };
    const auto load = [&](uint32_t chunk, Raw& raw) {
      fetch<T, kRagged>(a_.input, g.input, a_.at_input, locate_chunk<kRagged, N>(a_, g, chunk), raw.u);
      if constexpr (kJoined) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
        fetch_joined<kJoined>(At{g, c}, a_.joined.addend, raw.addend);
      }
    };
    held_.template fill<Raw>(load, [&](Chunk x, uint32_t chunk, uint32_t slot, const Raw& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      values<T, kRagged>(a_.input, g.input, a_.at_input, c, raw.u, x[0]);
      keep_sum<T, kJoined>(At{g, c}, a_.joined, raw.addend, x[0]);
      const int elements = kRagged ? c.span.count() : N;
      if (kRagged ? count == Real(0) : slot == 0) pilot = chunk_sum(x[0]) / Real(elements > 0 ? elements : 1);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[0][j] = !kRagged || c.span.has(j) ? x[0][j] - pilot : Real(0);
        sum += x[0][j];
        squares += x[0][j] * x[0][j];
      }
      if (kRagged) count += Real(elements);
    });
    if (!kRagged) count = Real(opaque(held_.mine()) * uint32_t(N));  // not kept as a double from group to group
    return finish(g, pilot, count, sum, squares);
  }

  // Leaves the signed logarithms; elements outside the run have h = 0, which adds nothing.
  __device__ __forceinline__ Estimate<Real> estimate(const GroupPlace& g, const Moments1<Real>& m) {
    LambdaSums<Real> terms;
    const Real shift = (pilot_ - m.mean_low) * m.rstd;
    held_.template each<true, true>([&](Chunk x, uint32_t chunk, uint32_t) {
      const Span span = locate_chunk<kRagged, N>(a_, g, chunk).span;
#pragma unroll
      for (int j = 0; j < N; ++j) x[0][j] = terms.add(!kRagged || span.has(j) ? x[0][j] * m.rstd + shift : Real(0));
    });
    Real sums[4];
    terms.totals(sums);
    team_.sum(sums);
    return finish_lambda(sums, m.rstd, a_.inverse_count, a_.alpha, a_.order, a_.eps, a_.root_eps);
  }

  // Leaves x; returns its mean.
  __device__ __forceinline__ Real transform(const Exponents<Real>& e, PrecisionPath path) {
    Real total[1] = {0};
    with_path(path, [&](auto tag) {
      held_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
        transform_chunk<tag.value>(x[0], e);
#pragma unroll
        for (int j = 0; j < N; ++j) total[0] += x[0][j];
      });
    });
    team_.sum(total);
    return total[0] * a_.inverse_count;
  }

  __device__ __forceinline__ Real deviation(const GroupPlace& g, Real mean) {
    Real total[1] = {0};
    held_.template each<true, false>([&](Chunk x, uint32_t chunk, uint32_t) {
      const Span span = locate_chunk<kRagged, N>(a_, g, chunk).span;
#pragma unroll
      for (int j = 0; j < N; ++j) total[0] += !kRagged || span.has(j) ? absolute(x[0][j] - mean) : Real(0);
    });
    team_.sum(total);
    return total[0] * a_.inverse_count;
  }

  // The last round, from x.
  __device__ __forceinline__ void write_noisy(const GroupPlace& g, uint64_t seed, Real noise) {
    const PhiloxSchedule keys(seed);
    const GroupAffine<Real> affine = group_affine<T>(a_, g);
    each_output(g, [&](Chunk x, uint32_t chunk, uint32_t, const Residual& residual) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      output_round<T, kRagged, true, kJoined>(a_, g, c, keys, noise, affine, residual, x[0]);
    });
  }

  // The last round where there is no noise, from the signed logarithms.
  __device__ __forceinline__ void write_plain(const GroupPlace& g, const Exponents<Real>& e, PrecisionPath path) {
    const GroupAffine<Real> affine = group_affine<T>(a_, g);
    with_path(path, [&](auto tag) {
      each_output(g, [&](Chunk x, uint32_t chunk, uint32_t, const Residual& residual) {
        transform_chunk<tag.value>(x[0], e);
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
        output_round<T, kRagged, false, kJoined>(a_, g, c, PhiloxSchedule(), Real(0), affine, residual, x[0]);
      });
    });
  }

 private:
  const RowsArgs<Real>& a_;
  Team& team_;

  // f(values, chunk, slot, the residual there) over what is held.
  using Residual = Extra<T, kJoined, kRagged>;
  template <class F>
  __device__ __forceinline__ void each_output(const GroupPlace& g, F f) {
    const auto load = [&](uint32_t chunk, Residual& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      fetch_joined<kJoined>(At{g, c}, a_.joined.residual, raw);
    };
    held_.template each_beside<Residual>(load, f);
  }

  // The group's first element as it is normalized, but for its rounding.
  __device__ __forceinline__ Real first_element(const GroupPlace& g) const {
    Real first = to_real(static_cast<const T*>(a_.input)[g.input]);
    if constexpr (kJoined) {
      const JoinedTensor& addend = a_.joined.addend;
      if (addend.data) first += to_real(static_cast<const T*>(addend.data)[group_offset<Real>(addend.at, g.outer, g.inner)]);
    }
    return first;
  }

  // The group's moments from each thread's, and pilot_. Of float threads the totals are taken in double, around the
  // group's first element: one reduction, where in the same precision it takes two. However far the group is from zero,
  // its first element lies within sqrt(n) deviations of the mean, so that n 1e-16 of the variance cancels.
  __device__ __forceinline__ Moments1<Real> finish(const GroupPlace& g, Real pilot, Real count, Real sum, Real squares) {
    if constexpr (sizeof(Real) == 4) {
      const Real first = first_element(g);
      const double from_first = double(pilot) - first, shifted = from_first * count + sum;
      double total[2] = {shifted, squares + from_first * (shifted + sum)};
      team_.sum(total);
      const double distance = total[0] * a_.inverse_count_double, mean = first + distance;
      const double variance = total[1] * a_.inverse_count_double - distance * distance;
      const Real rounded = Real(mean), low = Real(mean - rounded), nearest = Real(variance);
      pilot_ = pilot - rounded;
      return {rounded, low, fast_rsqrt((nearest < 0 ? Real(0) : nearest) + a_.eps) + in_range(nearest)};
    } else {
      Real total[1] = {pilot * count + sum};
      team_.sum(total);
      const Real mean = total[0] * a_.inverse_count;
      pilot_ = pilot - mean;
      const Real centred_sum = sum + count * pilot_;
      Real centred[2] = {centred_sum, squares + pilot_ * (sum + centred_sum)};
      team_.sum(centred);
      return finish_moments(mean, centred[0], centred[1], a_.inverse_count, a_.eps);
    }
  }

  static constexpr uint32_t kAhead = kJoined ? joined_ahead() : chunks_ahead<kRegister * N, 1, kNoise>();
  Held<Real, N, kRegister, 1, true, kAhead, kJoined ? joined_ahead() : kRegister> held_;
  Real pilot_ = 0;  // minus the group's rounded mean
};

template <class T, bool kRagged, bool kNoise, class Team, bool kJoined>
__global__ void __launch_bounds__(kForwardBlock, 1) rows_forward(const RowsArgs<RealOf<T>> a, typename Team::Sync sync) {
  using Real = RealOf<T>;
  Team team(sync);
  ForwardGroup<T, kRagged, kNoise, Team, kForwardRegister<T>, kJoined> pass(a, team);
#pragma unroll 1
  for (uint32_t group = team.index(); group < a.groups; group += team.count()) {
    const GroupPlace g = locate_group(a, group);
    const Moments1<Real> m = pass.moments(g);
    const Estimate<Real> estimate = pass.estimate(g, m);
    const Exponents<Real> e = make_exponents<Real>(estimate.lmbda, a.transform_eps);
    const PrecisionPath path = precision_path(e, a.transform_eps, false);
    // now, and not when all is done: the rounds that follow want the registers
    if (team.rank() == 0) write_statistics(a, group, m, estimate);
    Real scale = 0;
    if constexpr (kNoise) {
      const bool noisy = draws_noise<kNoise, kJoined>(a);
      const Real mean = pass.transform(e, path);
      if (noisy) scale = a.given_scale ? a.stats[int64_t(kNoiseScale) * a.groups + group] : pass.deviation(g, mean);
      const Real noise = a.noise_train * scale * kNormalUnit<Real>;
      pass.write_noisy(locate_group(a, opaque(group)), noisy ? uint64_t(*a.seed) : 0, noise);
    } else {
      pass.write_plain(g, e, path);
    }
    if (team.rank() == 0 && !a.given_scale) a.stats[int64_t(kNoiseScale) * a.groups + group] = scale;
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
