// The columns walk with a tile of columns resident in the registers and shared memory of co-operating blocks: one read
// and one write of device memory. For groups of one column (Batch, Instance).
#pragma once

#include "columns_stream.cuh"
#include "held.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Chunks of a thread in registers: fewer than of rows, because the constants of its columns are there as well.
template <class T>
constexpr int kColumnBackwardRegister = sizeof(T) == 8 ? 2 : 8 / kChunkOf<T>;

// The blocks that hold one tile. A cooperative launch, as GridTeam.
template <class T>
class TileTeam {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;

 public:
  using Totals = Real (&)[kMaxSums][kColumns];
  using Sync = typename GridTeam<Real>::Sync;  // partial: [team][2][blocks][kMaxSums][kColumns]

  __device__ explicit TileTeam(Sync sync) : sync_(sync) {}
  __device__ uint32_t block() const { return blockIdx.x % sync_.blocks; }
  __device__ uint32_t blocks() const { return sync_.blocks; }
  __device__ uint32_t index() const { return blockIdx.x / sync_.blocks; }
  __device__ uint32_t count() const { return gridDim.x / sync_.blocks; }

  // Each column's totals over all rows of the tile, seen by all threads of the team.
  template <int K>
  __device__ void sum(Real (&v)[K][N], Totals totals) {
    column_totals<T, K>(v, totals);
    if (sync_.blocks == 1) return;
    constexpr size_t kPart = size_t(kMaxSums) * kColumns;
    Real* buffer = sync_.partial + size_t(opaque(blockIdx.x) / sync_.blocks * 2 + turn_) * sync_.blocks * kPart;
    turn_ ^= 1;
    for (int i = int(threadIdx.x); i < K * kColumns; i += kColumnThreads)
      buffer[block() * kPart + i] = totals[i / kColumns][i % kColumns];
    __syncthreads();  // before the block says that it has arrived
    if (threadIdx.x == 0) {
      unsigned* counter = sync_.counters + opaque(blockIdx.x) / sync_.blocks;
      passed_ += sync_.blocks;
      arrive(counter);
      wait_for_arrivals(counter, passed_);
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < K * kColumns; i += kColumnThreads) {
      Real total = 0;
      for (uint32_t b = 0; b < sync_.blocks; ++b) total += __ldcg(buffer + b * kPart + i);
      totals[i / kColumns][i % kColumns] = total;
    }
    __syncthreads();
  }

 private:
  Sync sync_;
  unsigned turn_ = 0, passed_ = 0;
};

template <class T>
__device__ inline ColumnPlace locate_tile(const ColumnsArgs<RealOf<T>>& a, uint32_t slab) {
  constexpr int N = kChunkOf<T>;
  ColumnPlace p;
  p.split = 0;
  p.outer = slab / a.tiles;
  p.tile = slab - p.outer * a.tiles;
  p.x = threadIdx.x % kTileChunks;
  p.y = threadIdx.x / kTileChunks;
  p.column = p.tile * kTileColumns<T> + p.x * N;
  const int left = int(a.columns) - int(p.column);
  p.span = {0, left < 0 ? 0 : left < N ? left : N};
  return p;
}

// What a tile's threads share.
template <class T>
struct TileShared {
  RealOf<T> totals[kMaxSums][kTileColumns<T>];
  Moments1<RealOf<T>> moments[kTileColumns<T>];
  GroupConstants<RealOf<T>> of[kTileColumns<T>];
  InputGradient<RealOf<T>> gradient[kTileColumns<T>];
};

template <class T, bool kRagged, bool kJoined>
class ForwardTile {
  static constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;
  using At = RowAt<T, kRagged>;
  using Real = RealOf<T>;
  using Chunk = Real (&)[1][N];

 public:
  __device__ ForwardTile(const ColumnsArgs<Real>& a, TileTeam<T>& team, TileShared<T>& shared, const ColumnPlace& p)
      : a_(a), team_(team), shared_(shared), p_(p),
        held_(p.span.hi > 0 ? a.walk.runs : 0, team.block() * kColumnRows + p.y, team.blocks() * kColumnRows) {}

  __device__ __forceinline__ void moments() {
    Real total[1][N] = {};
    struct Raw {
      Fetched<T, kRagged> u;
      Extra<T, kJoined, kRagged> addend;
    };
    const RowsArgs<Real>& w = a_.walk;
    const auto load = [&](uint32_t row, Raw& raw) {
      fetch_row<T, kRagged>(w.input, w.at_input, p_, row, raw.u);
      fetch_joined<kJoined>(At{p_, row}, w.joined.addend, raw.addend);
    };
    held_.template fill<Raw>(load, [&](Chunk x, uint32_t row, uint32_t, const Raw& raw) {
      row_values<T, kRagged>(w.input, w.at_input, p_, row, raw.u, x[0]);
      keep_sum<T, kJoined>(At{p_, row}, w.joined, raw.addend, x[0]);
#pragma unroll
      for (int j = 0; j < N; ++j) total[0][j] += x[0][j];
    });
    team_.sum(total, shared_.totals);
    Real mean[N], centred[2][N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = shared_.totals[0][p_.x * N + j] * a_.walk.inverse_count;
    held_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[0][j] -= mean[j];
        centred[0][j] += x[0][j];
        centred[1][j] += x[0][j] * x[0][j];
      }
    });
    team_.sum(centred, shared_.totals);
    if (p_.y == 0) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int i = int(p_.x) * N + j;
        shared_.moments[i] = finish_moments(mean[j], shared_.totals[0][i], shared_.totals[1][i], a_.walk.inverse_count,
                                            a_.walk.eps);
      }
    }
    __syncthreads();
  }

  __device__ __forceinline__ void estimate() {
    Real rstd[N], shift[N], sums[4][N];
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Moments1<Real>& m = shared_.moments[p_.x * N + j];
      rstd[j] = m.rstd;
      shift[j] = -m.mean_low * m.rstd;
    }
    LambdaSums<Real> terms[N];
    held_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[0][j] = terms[j].add(x[0][j] * rstd[j] + shift[j]);
    });
    column_lambda_totals(terms, sums);
    team_.sum(sums, shared_.totals);
    for (int i = int(threadIdx.x); i < kColumns; i += kColumnThreads) finish_column(i);
    __syncthreads();
  }

  // x in place of the logarithms; its mean goes to totals[0].
  __device__ __forceinline__ void transform() {
    Real total[1][N] = {}, ones[N];
#pragma unroll
    for (int j = 0; j < N; ++j) ones[j] = Real(1);
    const ColumnExponents<N, Real> exponents(constants(), ones, p_.span);
    with_path(exponents.path, [&](auto tag) {
      held_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
        transform_row<tag.value>(x[0], exponents, constants(), ones);
#pragma unroll
        for (int j = 0; j < N; ++j) total[0][j] += x[0][j];
      });
    });
    team_.sum(total, shared_.totals);
  }

  __device__ __forceinline__ void deviation() {
    Real mean[N], total[1][N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = shared_.totals[0][p_.x * N + j] * a_.walk.inverse_count;
    held_.template each<true, false>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) total[0][j] += absolute(x[0][j] - mean[j]);
    });
    team_.sum(total, shared_.totals);
  }

  // The last round: from x where there is noise, else from the logarithms.
  template <bool kNoise>
  __device__ __forceinline__ void write() {
    const bool noisy = draws_noise<kNoise, kJoined>(a_.walk);
    const PhiloxSchedule keys(noisy ? uint64_t(*a_.walk.seed) : 0);
    Real weight[N], bias[N], noise[N] = {};
    column_parameters<T>(a_.walk.weight, a_.walk.weight_in_storage, Real(1), p_, weight);
    column_parameters<T>(a_.walk.bias, a_.walk.bias_in_storage, Real(0), p_, bias);
    if constexpr (kNoise) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (noisy && j < p_.span.hi) noise[j] = a_.walk.noise_train * kNormalUnit<Real> * scale(int(p_.x) * N + j);
      each_output([&](Chunk x, uint32_t row) {
        Real z[N] = {};
        if (noisy) row_normals<kRagged>(a_.walk, p_, row, keys, z);
#pragma unroll
        for (int j = 0; j < N; ++j) x[0][j] = (x[0][j] + noise[j] * z[j]) * weight[j] + bias[j];
      });
    } else {
      const ColumnExponents<N, Real> exponents(constants(), weight, p_.span);
      with_path(exponents.path, [&](auto tag) {
        each_output([&](Chunk x, uint32_t) {
          transform_row<tag.value>(x[0], exponents, constants(), weight);
#pragma unroll
          for (int j = 0; j < N; ++j) x[0][j] += bias[j];
        });
      });
    }
    if (team_.block() > 0 || a_.walk.given_scale) return;
    for (int i = int(threadIdx.x); i < kColumns && group(i) < group_end(); i += kColumnThreads)
      a_.walk.stats[int64_t(kNoiseScale) * a_.walk.groups + group(i)] = noisy ? scale(i) : Real(0);
  }

 private:
  // f(values, row) over what is held leaves what is written.
  template <class F>
  __device__ __forceinline__ void each_output(F f) {
    using Raw = Extra<T, kJoined, kRagged>;
    const auto load = [&](uint32_t row, Raw& raw) { fetch_joined<kJoined>(At{p_, row}, a_.walk.joined.residual, raw); };
    held_.template each_beside<Raw>(load, [&](Chunk x, uint32_t row, uint32_t, const Raw& residual) {
      f(x, row);
      join_output<kJoined>(At{p_, row}, a_.walk.joined, residual, x[0]);
      write_row<T, kRagged>(a_.walk.output, a_.walk.at_output, p_, row, x[0]);
    });
  }
  __device__ uint32_t group(int i) const { return p_.outer * a_.columns + p_.tile * kColumns + i; }
  __device__ uint32_t group_end() const { return (p_.outer + 1) * a_.columns; }
  __device__ Real scale(int i) const {
    return a_.walk.given_scale ? a_.walk.stats[int64_t(kNoiseScale) * a_.walk.groups + group(i)]
                               : shared_.totals[0][i] * a_.walk.inverse_count;
  }
  // Of this thread's columns.
  __device__ __forceinline__ const GroupConstants<Real>* constants() const { return shared_.of + p_.x * N; }
  __device__ __forceinline__ void finish_column(int i) {
    const Real sums[4] = {shared_.totals[0][i], shared_.totals[1][i], shared_.totals[2][i], shared_.totals[3][i]};
    const RowsArgs<Real>& w = a_.walk;
    const Estimate<Real> e =
        finish_lambda(sums, shared_.moments[i].rstd, w.inverse_count, w.alpha, w.order, w.eps, w.root_eps);
    shared_.of[i].exponents = make_exponents<Real>(e.lmbda, w.transform_eps);
    shared_.of[i].path = precision_path(shared_.of[i].exponents, w.transform_eps, false);
    if (team_.block() == 0 && group(i) < group_end())
      write_statistics(w, group(i), shared_.moments[i], e);
  }

  const ColumnsArgs<Real>& a_;
  TileTeam<T>& team_;
  TileShared<T>& shared_;
  const ColumnPlace& p_;
  Held<Real, N, kForwardRegister<T>, 1> held_;
};

template <class T, bool kRagged, bool kNoise, bool kJoined>
__global__ void __launch_bounds__(kColumnThreads, kBlocksAtOnce)
column_forward(const ColumnsArgs<RealOf<T>> a, typename TileTeam<T>::Sync sync) {
  __shared__ TileShared<T> shared;
  TileTeam<T> team(sync);
  const uint32_t slabs = a.walk.groups / a.columns * a.tiles;
#pragma unroll 1
  for (uint32_t slab = team.index(); slab < slabs; slab += team.count()) {
    const ColumnPlace p = locate_tile<T>(a, slab);
    ForwardTile<T, kRagged, kJoined> pass(a, team, shared, p);
    pass.moments();
    pass.estimate();
    if constexpr (kNoise) {
      pass.transform();
      if (draws_noise<kNoise, kJoined>(a.walk) && !a.walk.given_scale) pass.deviation();
    }
    pass.template write<kNoise>();
  }
}

template <class T, bool kRagged, bool kJoined>
__global__ void __launch_bounds__(kColumnThreads, kBlocksAtOnce)
column_backward(const ColumnsArgs<RealOf<T>> a, typename TileTeam<T>::Sync sync) {
  using Real = RealOf<T>;
  using At = RowAt<T, kRagged>;
  constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;
  using Chunk = Real (&)[3][N];  // G psi_h, w, h
  __shared__ TileShared<T> shared;
  TileTeam<T> team(sync);
  const bool noisy = a.walk.noise && a.walk.weight_part != nullptr;
  const PhiloxSchedule keys(noisy ? uint64_t(*a.walk.seed) : 0);
  const uint32_t slabs = a.walk.groups / a.columns * a.tiles;
#pragma unroll 1
  for (uint32_t slab = team.index(); slab < slabs; slab += team.count()) {
    const ColumnPlace p = locate_tile<T>(a, slab);
    load_tile<T>(a, p, shared.of);
    Held<Real, N, kColumnBackwardRegister<T>, 3, true, 1> held(p.span.hi > 0 ? a.walk.runs : 0, team.block() * kColumnRows + p.y,
                                                team.blocks() * kColumnRows);
    const GroupConstants<Real>* constants = shared.of + p.x * N;
    ColumnGradients<kRagged, N, Real> pass(constants, p.span);
    with_path(pass.path, [&](auto tag) {
      struct Raw {
        Fetched<T, kRagged> u, g;
        Extra<T, kJoined, kRagged> activated;
      };
      const auto load = [&](uint32_t row, Raw& raw) {
        fetch_row<T, kRagged>(a.walk.input, a.walk.at_input, p, row, raw.u);
        fetch_row<T, kRagged>(a.walk.grad, a.walk.at_grad, p, row, raw.g);
        fetch_mask<kJoined>(At{p, row}, a.walk.joined.activated, raw.activated);
      };
      const auto hint = [&](uint32_t row) {
        expect(row_address<T>(a.walk.input, a.walk.at_input, p, row));
        expect(row_address<T>(a.walk.grad, a.walk.at_grad, p, row));
        if constexpr (kJoined) At{p, row}.expect(a.walk.joined.activated);
      };
      held.template fill<Raw>(load, [&](Chunk kept, uint32_t row, uint32_t, const Raw& raw) {
        Real g[N], z[N] = {};
        row_values<T, kRagged>(a.walk.input, a.walk.at_input, p, row, raw.u, kept[2]);
        row_values<T, kRagged>(a.walk.grad, a.walk.at_grad, p, row, raw.g, g);
        join_mask<kJoined>(At{p, row}, a.walk.joined, raw.activated, g);
        if (noisy) row_normals<kRagged>(a.walk, p, row, keys, z);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (kRagged && !p.span.has(j)) continue;
          const Real h = pass.standardize(j, kept[2][j], constants);
          const Slopes<Real> s = pass.template add<tag.value>(j, h, g[j], Real(1), gradient_noise(a.walk, constants[j]),
                                                              z[j], constants);
          kept[0][j] = s.through_h, kept[1][j] = s.w, kept[2][j] = h;
        }
      }, hint);
    });
    pass.natural();
    team.sum(pass.sums, shared.totals);
    for (int i = int(threadIdx.x); i < kColumns; i += kColumnThreads) {
      const uint32_t column = p.tile * kColumns + i;
      if (column >= a.columns) break;
      Real totals[5];
#pragma unroll
      for (int k = 0; k < 5; ++k) totals[k] = shared.totals[k][i];
      const Real weight = a.walk.weight ? load_parameter<T>(a.walk.weight, a.walk.weight_in_storage, column) : Real(1);
      shared.gradient[i] = finish_gradient(totals, weight, a.walk.inverse_count, shared.of[i].rstd, a.walk.frozen);
      if (team.block() > 0) continue;
      if (a.walk.bias_part) a.walk.bias_part[p.outer * a.columns + column] = shared.totals[5][i];
      if (a.walk.weight_part) a.walk.weight_part[p.outer * a.columns + column] = shared.totals[6][i];
    }
    __syncthreads();
    if (a.walk.output == nullptr) continue;
    const ColumnPlace place = locate_tile<T>(a, opaque(slab));
    using Raw = Extra<T, kJoined, kRagged>;
    const auto load = [&](uint32_t row, Raw& raw) { fetch_joined<kJoined>(At{place, row}, a.walk.joined.grad_sum, raw); };
    held.template each_beside<Raw>(load, [&](Chunk kept, uint32_t row, uint32_t, const Raw& grad_sum) {
      Real out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = shared.gradient[place.x * N + j](kept[0][j], kept[1][j], kept[2][j]);
      join_sum_gradient<kJoined>(At{place, row}, a.walk.joined, grad_sum, out);
      write_row<T, kRagged>(a.walk.output, a.walk.at_output, place, row, out);
    });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
