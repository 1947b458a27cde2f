// The backward pass of the rows walk with the group resident on chip: two reads and one write of device memory.
#pragma once

#include <type_traits>

#include "held.cuh"
#include "rounds.cuh"
#include "rows.cuh"
#include "rows_forward.cuh"
#include "team.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Three numbers an element are held between the rounds, and two more where the weight varies by element.
template <class T>
constexpr int kBackwardRegister = 16 / kChunkOf<T>;

// Where blocks work together: the fewer, the more of the shared memory's can be on their way.
template <class T>
constexpr int kTeamBackwardRegister = sizeof(T) == 8 ? 2 : 8 / kChunkOf<T>;

// Sums for the parameters' gradients, one pair an element of this thread's chunks; they last over all groups.
template <class T, bool kElementwise, int kRegister>
struct ElementSums {
  RealOf<T> weight[kRegister][kChunkOf<T>] = {};
  RealOf<T> bias[kRegister][kChunkOf<T>] = {};
};
template <class T, int kRegister>
struct ElementSums<T, false, kRegister> {};

// g times the weight where it varies within the group: one for the whole group is left to finish_gradient().
template <class T, bool kRagged, class Real>
__device__ __forceinline__ void weighted_gradient(const RowsArgs<Real>& a, const GroupPlace& place, const ChunkPlace& c,
                                                  const Real (&g)[kChunkOf<T>], Real (&weighted)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if (a.affine == Affine::kPerElement) {
    element_parameters<T, kRagged>(a.weight, a.weight_in_storage, Real(1), c, weighted);
#pragma unroll
    for (int j = 0; j < N; ++j) weighted[j] *= g[j];
  } else {
    const Real weight = a.affine == Affine::kPerRun ? run_affine<T>(a, place.inner * a.runs + c.run).weight : Real(1);
#pragma unroll
    for (int j = 0; j < N; ++j) weighted[j] = a.affine == Affine::kPerRun ? g[j] * weight : g[j];
  }
}

template <class T, bool kRagged, bool kElementwise, class Team, int kRegister = kBackwardRegister<T>,
          bool kJoined = false>
class BackwardGroup {
  static constexpr int N = kChunkOf<T>;
  using At = ChunkAt<T, kRagged>;
  using Real = RealOf<T>;
  using Chunk = Real (&)[3][N];  // G psi_h, w, h

 public:
  __device__ BackwardGroup(const RowsArgs<Real>& a, Team& team)
      : a_(a), team_(team), held_(a.chunks, team.rank(), team.size()) {}

  __device__ __forceinline__ void reduce(const GroupPlace& place, const GroupConstants<Real>& constants,
                                         Real (&sums)[kGradientSums]) {
    const bool noisy = a_.noise && a_.weight_part != nullptr;
    // in the unit of x
    const Real noise = a_.noise_train * constants.noise_scale * (kNormalUnit<Real> / DeviceLog<Real>::kUnit);
    const PhiloxSchedule keys(noisy ? uint64_t(*a_.seed) : 0);
    with_path(constants.path, [&](auto tag) {
      constexpr bool kLate = kRagged || tag.value != PrecisionPath::kPlain;
      struct Raw {
        Fetched<T, kLate> u, g;
        Extra<T, kJoined, kLate> activated;
      };
      const auto load = [&](uint32_t chunk, Raw& raw) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
        fetch<T, kRagged>(a_.input, place.input, a_.at_input, c, raw.u);
        fetch<T, kRagged>(a_.grad, place.grad, a_.at_grad, c, raw.g);
        fetch_mask<kJoined>(At{place, c}, a_.joined.activated, raw.activated);
      };
      held_.template fill<Raw>(load, [&](Chunk kept, uint32_t chunk, uint32_t slot, const Raw& raw) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
        Real g[N], x[N];
        values<T, kRagged>(a_.input, place.input, a_.at_input, c, raw.u, kept[2]);
        values<T, kRagged>(a_.grad, place.grad, a_.at_grad, c, raw.g, g);
        join_mask<kJoined>(At{place, c}, a_.joined, raw.activated, g);
        weighted_gradient<T, kRagged>(a_, place, c, g, kept[0]);
        slopes<tag.value>(c.span, constants, kept, x, sums);
        if constexpr (kElementwise) {
          if (noisy) add_noise<kRagged>(a_, place, c, keys, noise, x);
          add_parameters(g, x, slot, sums);
        } else {
          add_parameters(g, x, slot, sums);
          if (noisy) sums[6] += noise * noise_product<kRagged>(a_, place, c, keys, g);
        }
      });
    });
    natural_sums(sums);
    team_.sum(sums);
  }

  __device__ __forceinline__ void write(const GroupPlace& place, const InputGradient<Real>& du) {
    using Raw = Extra<T, kJoined, kRagged>;
    const auto load = [&](uint32_t chunk, Raw& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
      fetch_joined<kJoined>(At{place, c}, a_.joined.grad_sum, raw);
    };
    held_.template each_beside<Raw>(load, [&](Chunk kept, uint32_t chunk, uint32_t, const Raw& grad_sum) {
      Real out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = du(kept[0][j], kept[1][j], kept[2][j]);
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
      join_sum_gradient<kJoined>(At{place, c}, a_.joined, grad_sum, out);
      write_chunk<T, kRagged>(a_.output, place.output, a_.at_output, c, out);
    });
  }

  // This team's share of the parameters' gradients, where they vary by element.
  __device__ __forceinline__ void write_element_sums() {
    if constexpr (kElementwise) {
      const GroupPlace origin = {};
      held_.template each<false, false>([&](Chunk, uint32_t chunk, uint32_t slot) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, origin, chunk);
        const int64_t at = team_.index() * a_.length + c.first;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (kRagged && !c.span.has(j)) continue;
          if (a_.weight_part) a_.weight_part[at + j] = element_.weight[slot][j] * DeviceLog<Real>::kUnit;
          if (a_.bias_part) a_.bias_part[at + j] = element_.bias[slot][j];
        }
      });
    }
  }

 private:
  // From (G, -, u) to (G psi_h, w, h), x in the logarithms' unit; elements outside the run become zeros.
  template <PrecisionPath kPath>
  __device__ __forceinline__ void slopes(Span span, const GroupConstants<Real>& constants, Chunk kept, Real (&x)[N],
                                         Real (&sums)[kGradientSums]) {
    const SignedExponent<Real> exponent = gradient_exponent(constants.exponents);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!kRagged || span.has(j)) {
        kept[2][j] = constants.standardize(kept[2][j]);
        const Slopes<Real> s =
            gradient_round(kPath, kept[2][j], kept[0][j], exponent, constants.exponents, constants.lmbda, sums);
        kept[0][j] = s.through_h, kept[1][j] = s.w, x[j] = s.x;
      } else {
        kept[0][j] = kept[1][j] = kept[2][j] = x[j] = Real(0);
      }
    }
  }

  __device__ __forceinline__ void add_parameters(const Real (&g)[N], const Real (&x)[N], uint32_t slot,
                                                 Real (&sums)[kGradientSums]) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if constexpr (kElementwise) {
        element_.bias[slot][j] += g[j];
        element_.weight[slot][j] += g[j] * x[j];
      } else {
        sums[5] += g[j];
        sums[6] += g[j] * x[j];
      }
    }
  }

  const RowsArgs<Real>& a_;
  Team& team_;
  static constexpr uint32_t kAhead = kJoined ? joined_ahead() : chunks_ahead<kRegister * N, 3>();
  Held<Real, N, kRegister, 3, !kElementwise, kAhead, kJoined ? joined_ahead() : kRegister> held_;
  ElementSums<T, kElementwise, kRegister> element_;
};

template <class T, bool kRagged, bool kElementwise, class Team, bool kJoined>
__global__ void __launch_bounds__(kJoined ? kJoinedBackwardBlock : kBackwardBlock, 1)
rows_backward(const RowsArgs<RealOf<T>> a, typename Team::Sync sync) {
  using Real = RealOf<T>;
  Team team(sync);
  constexpr bool kAlone = kElementwise || std::is_same_v<Team, BlockTeam<Real>>;
  constexpr int kRegister = kAlone ? kBackwardRegister<T> : kTeamBackwardRegister<T>;
  BackwardGroup<T, kRagged, kElementwise, Team, kRegister, kJoined> pass(a, team);
#pragma unroll 1
  for (uint32_t group = team.index(); group < a.groups; group += team.count()) {
    const GroupPlace place = locate_group(a, group);
    const GroupConstants<Real> constants =
        load_constants(a.stats, group, a.groups, a.alpha, a.order, a.transform_eps, a.frozen);
    Real sums[kGradientSums] = {};
    pass.reduce(place, constants, sums);
    if (!kElementwise && team.rank() == 0 && a.affine == Affine::kPerGroup) {
      if (a.bias_part) a.bias_part[group] = sums[5];
      if (a.weight_part) a.weight_part[group] = sums[6];
    }
    if (a.output) {
      const Real weight = group_affine<T>(a, place).weight;
      pass.write(locate_group(a, opaque(group)), finish_gradient(sums, weight, a.inverse_count, constants.rstd, a.frozen));
    }
  }
  pass.write_element_sums();
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
