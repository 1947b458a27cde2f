// The columns layout, resident: co-operating blocks keep a tile of columns in registers and shared memory. Device memory is
// read once (backward: twice, input and gradient) and written once. For groups of one column (Batch, Instance).
#pragma once

#include "columns.cuh"
#include "rows_resident.cuh"
#include "tile_cache.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Chunks of a thread in registers: fewer than in the rows layout, because the columns' constants are in registers too.
template <class T>
constexpr int kColumnBackwardRegister = sizeof(T) == 8 ? 2 : 8 / kChunkOf<T>;

// The thread group of a tile: blocks of a cooperative launch, as GridThreads.
template <class T>
class TileThreads {
  using Real = RealOf<T>;
  static constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;

 public:
  using Totals = Real (&)[kMaxSums][kColumns];
  using Sync = typename GridThreads<Real>::Sync;  // partial: [thread group][2][blocks][kMaxSums][kColumns]

  __device__ explicit TileThreads(Sync sync) : sync_(sync) {}
  __device__ uint32_t block() const { return blockIdx.x % sync_.blocks; }
  __device__ uint32_t blocks() const { return sync_.blocks; }
  __device__ uint32_t index() const { return blockIdx.x / sync_.blocks; }
  __device__ uint32_t count() const { return gridDim.x / sync_.blocks; }

  // Each column's totals over all rows of the tile, visible to all threads of the thread group.
  template <int K>
  __device__ void sum(Real (&v)[K][N], Totals totals) {
    column_totals<T, K>(v, totals);
    if (sync_.blocks == 1) return;
    constexpr size_t kPart = size_t(kMaxSums) * kColumns;
    Real* buffer = sync_.partial + size_t(opaque(blockIdx.x) / sync_.blocks * 2 + turn_) * sync_.blocks * kPart;
    turn_ ^= 1;
    for (int i = int(threadIdx.x); i < K * kColumns; i += kColumnThreads)
      buffer[block() * kPart + i] = totals[i / kColumns][i % kColumns];
    __syncthreads();  // all of the block's sums are written before it arrives
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

// Shared memory of a tile.
template <class T>
struct TileShared {
  RealOf<T> totals[kMaxSums][kTileColumns<T>];
  Moments1<RealOf<T>> moments[kTileColumns<T>];
  GroupConstants<RealOf<T>> of[kTileColumns<T>];
  InputGradient<RealOf<T>> gradient[kTileColumns<T>];
};

template <class T, bool kRagged, bool kFused>
class ForwardTile {
  static constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;
  using At = RowAt<T, kRagged>;
  using Real = RealOf<T>;
  using Chunk = Real (&)[1][N];
  using Raw = InputFetch<T, kFused, kRagged, InRegisters>;

 public:
  __device__ ForwardTile(const ColumnsArgs<Real>& a, TileThreads<T>& threads, TileShared<T>& shared, const ColumnPlace& p)
      : a_(a), threads_(threads), shared_(shared), p_(p),
        cache_(p.span.hi > 0 ? a.runs : 0, threads.block() * kColumnRows + p.y, threads.blocks() * kColumnRows) {}

  __device__ __forceinline__ void moments() {
    Real total[1][N] = {};
    const auto load = [&](uint32_t row, auto& raw) {
      fetch_row<T, kRagged>(a_.input, a_.at_input, p_, row, raw.u);
      fetch_fused<kFused>(At{p_, row}, a_.fused.addend, raw.beside);
    };
    cache_.template fill<Raw>(load, [&](Chunk x, uint32_t row, uint32_t, const auto& raw) {
      row_values<T, kRagged>(a_.input, a_.at_input, p_, row, raw.u, x[0]);
      add_and_write_sum<T, kFused>(At{p_, row}, a_.fused, raw.beside, x[0]);
#pragma unroll
      for (int j = 0; j < N; ++j) total[0][j] += x[0][j];
    });
    threads_.sum(total, shared_.totals);
    Real mean[N], centred[2][N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = shared_.totals[0][p_.x * N + j] * a_.inverse_count;
    cache_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[0][j] -= mean[j];
        centred[0][j] += x[0][j];
        centred[1][j] += x[0][j] * x[0][j];
      }
    });
    threads_.sum(centred, shared_.totals);
    if (p_.y == 0) {
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const int i = int(p_.x) * N + j;
        shared_.moments[i] = finish_moments(mean[j], shared_.totals[0][i], shared_.totals[1][i], a_.inverse_count,
                                            a_.settings.eps);
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
    cache_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) x[0][j] = add_lambda_terms(terms[j], x[0][j] * rstd[j] + shift[j]);
    });
    column_lambda_totals(terms, sums);
    threads_.sum(sums, shared_.totals);
    for (int i = int(threadIdx.x); i < kColumns; i += kColumnThreads) finish_column(i);
    __syncthreads();
  }

  // Replaces the logarithms by x; totals[0] is its sum.
  __device__ __forceinline__ void transform() {
    Real total[1][N] = {}, ones[N];
#pragma unroll
    for (int j = 0; j < N; ++j) ones[j] = Real(1);
    const ColumnExponents<N, Real> exponents(constants(), ones, p_.span);
    with_path(exponents.path, [&](auto tag) {
      cache_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
        transform_row<tag.value>(x[0], exponents, constants(), ones);
#pragma unroll
        for (int j = 0; j < N; ++j) total[0][j] += x[0][j];
      });
    });
    threads_.sum(total, shared_.totals);
  }

  __device__ __forceinline__ void deviation() {
    Real mean[N], total[1][N] = {};
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = shared_.totals[0][p_.x * N + j] * a_.inverse_count;
    cache_.template each<true, false>([&](Chunk x, uint32_t, uint32_t) {
#pragma unroll
      for (int j = 0; j < N; ++j) total[0][j] += absolute(x[0][j] - mean[j]);
    });
    threads_.sum(total, shared_.totals);
  }

  // The last round: from x with noise, else from the logarithms.
  template <bool kNoise>
  __device__ __forceinline__ void write() {
    const bool noisy = draws_noise<kNoise, kFused>(a_);
    const PhiloxSchedule keys(noisy ? uint64_t(*a_.seed) : 0);
    Real weight[N], bias[N], noise[N] = {};
    column_parameters<T>(a_.weight, a_.weight_in_storage, Real(1), p_, weight);
    column_parameters<T>(a_.bias, a_.bias_in_storage, Real(0), p_, bias);
    if constexpr (kNoise) {
#pragma unroll
      for (int j = 0; j < N; ++j)
        if (noisy && j < p_.span.hi) noise[j] = a_.noise_train * kNormalUnit<Real> * scale(int(p_.x) * N + j);
      each_output([&](Chunk x, uint32_t row) {
        Real z[N] = {};
        if (noisy) row_normals<kRagged>(a_, p_, row, keys, z);
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
    if (threads_.block() > 0 || a_.given_scale) return;
    for (int i = int(threadIdx.x); i < kColumns && group(i) < group_end(); i += kColumnThreads)
      a_.stats[int64_t(kNoiseScale) * a_.groups + group(i)] = noisy ? scale(i) : Real(0);
  }

 private:
  // f(values, row) over the cached rows leaves the values to store.
  template <class F>
  __device__ __forceinline__ void each_output(F f) {
    using Residual = FusedFetch<T, kFused, kRagged>;
    const auto load = [&](uint32_t row, Residual& raw) { fetch_fused<kFused>(At{p_, row}, a_.fused.residual, raw); };
    cache_.template each_with<Residual>(load, [&](Chunk x, uint32_t row, uint32_t, const Residual& residual) {
      f(x, row);
      apply_epilogue<kFused>(At{p_, row}, a_.fused, residual, x[0]);
      write_row<T, kRagged>(a_.output, a_.at_output, p_, row, x[0]);
    });
  }
  __device__ uint32_t group(int i) const { return p_.outer * a_.columns + p_.tile * kColumns + i; }
  __device__ uint32_t group_end() const { return (p_.outer + 1) * a_.columns; }
  __device__ Real scale(int i) const {
    return a_.given_scale ? a_.stats[int64_t(kNoiseScale) * a_.groups + group(i)]
                               : shared_.totals[0][i] * a_.inverse_count;
  }
  // The constants of this thread's columns.
  __device__ __forceinline__ const GroupConstants<Real>* constants() const { return shared_.of + p_.x * N; }
  __device__ __forceinline__ void finish_column(int i) {
    const Real sums[4] = {shared_.totals[0][i], shared_.totals[1][i], shared_.totals[2][i], shared_.totals[3][i]};
    const Estimate<Real> e =
        finish_lambda(sums, shared_.moments[i].rstd, a_.inverse_count, a_.settings);
    shared_.of[i].exponents = make_exponents<Real>(e.lmbda, a_.settings);
    shared_.of[i].path = precision_path(shared_.of[i].exponents, a_.settings, false);
    if (threads_.block() == 0 && group(i) < group_end())
      write_statistics(a_, group(i), shared_.moments[i], e);
  }

  const ColumnsArgs<Real>& a_;
  TileThreads<T>& threads_;
  TileShared<T>& shared_;
  const ColumnPlace& p_;
  TileCache<Real, N, kForwardRegister<T>, 1, kFused> cache_;
};

template <class T, bool kRagged, bool kNoise, bool kFused>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerMultiprocessor)
column_forward(const ColumnsArgs<RealOf<T>> a, typename TileThreads<T>::Sync sync) {
  __shared__ TileShared<T> shared;
  TileThreads<T> threads(sync);
  const uint32_t slabs = a.groups / a.columns * a.tiles;
#pragma unroll 1
  for (uint32_t slab = threads.index(); slab < slabs; slab += threads.count()) {
    const ColumnPlace p = locate_tile<T>(a, slab);
    ForwardTile<T, kRagged, kFused> pass(a, threads, shared, p);
    pass.moments();
    pass.estimate();
    if constexpr (kNoise) {
      pass.transform();
      if (draws_noise<kNoise, kFused>(a) && !a.given_scale) pass.deviation();
    }
    pass.template write<kNoise>();
  }
}

template <class T, bool kRagged, bool kFused>
__global__ void __launch_bounds__(kColumnThreads, kBlocksPerMultiprocessor)
column_backward(const ColumnsArgs<RealOf<T>> a, typename TileThreads<T>::Sync sync) {
  using Real = RealOf<T>;
  using At = RowAt<T, kRagged>;
  constexpr int N = kChunkOf<T>, kColumns = kTileColumns<T>;
  using Chunk = Real (&)[3][N];  // G psi_h, w, h
  // the chunk for registers; fused, three tensors' would spill
  using Raw = GradientFetch<T, kFused, false, kRagged || kFused, InRegisters>;
  using InSlot = GradientFetch<T, kFused, false, kRagged, InShared>;
  __shared__ TileShared<T> shared;
  TileThreads<T> threads(sync);
  const bool noisy = a.noise && a.weight_partials != nullptr;
  const PhiloxSchedule keys(noisy ? uint64_t(*a.seed) : 0);
  const uint32_t slabs = a.groups / a.columns * a.tiles;
#pragma unroll 1
  for (uint32_t slab = threads.index(); slab < slabs; slab += threads.count()) {
    const ColumnPlace p = locate_tile<T>(a, slab);
    load_tile<T>(a, p, shared.of);
    TileCache<Real, N, kColumnBackwardRegister<T>, 3, kFused> cache(
        p.span.hi > 0 ? a.runs : 0, threads.block() * kColumnRows + p.y, threads.blocks() * kColumnRows);
    const GroupConstants<Real>* constants = shared.of + p.x * N;
    ColumnGradients<kRagged, N, Real> pass(constants, p.span);
    with_path(pass.path, [&](auto tag) {
      const auto load = [&](uint32_t row, auto& raw) {
        fetch_row<T, kRagged>(a.input, a.at_input, p, row, raw.u);
        fetch_row<T, kRagged>(a.grad, a.at_grad, p, row, raw.g);
        fetch_mask<kFused>(At{p, row}, a.fused.activated, raw.activated);
      };
      cache.template fill<Raw, InSlot>(load, [&](Chunk kept, uint32_t row, uint32_t, const auto& raw) {
        Real g[N], z[N] = {};
        row_values<T, kRagged>(a.input, a.at_input, p, row, raw.u, kept[2]);
        row_values<T, kRagged>(a.grad, a.at_grad, p, row, raw.g, g);
        mask_gradient<kFused>(At{p, row}, a.fused, raw.activated, g);
        if (noisy) row_normals<kRagged>(a, p, row, keys, z);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          if (kRagged && !p.span.has(j)) continue;
          const Real h = pass.standardize(j, kept[2][j], constants);
          const Slopes<Real> s = pass.template add<tag.value>(j, h, g[j], Real(1), gradient_noise(a, constants[j]),
                                                              z[j], constants);
          kept[0][j] = s.through_h, kept[1][j] = s.w, kept[2][j] = h;
        }
      });
    });
    pass.natural();
    threads.sum(pass.sums, shared.totals);
    for (int i = int(threadIdx.x); i < kColumns; i += kColumnThreads) {
      const uint32_t column = p.tile * kColumns + i;
      if (column >= a.columns) break;
      Real totals[5];
#pragma unroll
      for (int k = 0; k < 5; ++k) totals[k] = shared.totals[k][i];
      const Real weight = a.weight ? load_parameter<T>(a.weight, a.weight_in_storage, column) : Real(1);
      shared.gradient[i] = finish_gradient(totals, weight, a.inverse_count, shared.of[i].rstd, a.frozen);
      if (threads.block() > 0) continue;
      if (a.bias_partials) a.bias_partials[p.outer * a.columns + column] = shared.totals[5][i];
      if (a.weight_partials) a.weight_partials[p.outer * a.columns + column] = shared.totals[6][i];
    }
    __syncthreads();
    if (a.output == nullptr) continue;
    const ColumnPlace place = locate_tile<T>(a, opaque(slab));
    using SumGradient = FusedFetch<T, kFused, kRagged>;
    const auto load = [&](uint32_t row, SumGradient& raw) { fetch_fused<kFused>(At{place, row}, a.fused.grad_sum, raw); };
    cache.template each_with<SumGradient>(load, [&](Chunk kept, uint32_t row, uint32_t, const SumGradient& grad_sum) {
      Real out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = shared.gradient[place.x * N + j](kept[0][j], kept[1][j], kept[2][j]);
      add_sum_gradient<kFused>(At{place, row}, a.fused, grad_sum, out);
      write_row<T, kRagged>(a.output, a.at_output, place, row, out);
    });
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
