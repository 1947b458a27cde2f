// The columns layout, streaming: a launch a round, as rows_streaming.cuh. Every other round goes through the rows from the
// last to the first: L2 holds what the round before has read last.
#pragma once

#include "columns_resident.cuh"
#include "rows_streaming.cuh"

namespace normnorm {
namespace cuda {
namespace {

template <class T>
__device__ inline ColumnPlace locate_column(const ColumnsArgs<RealOf<T>>& a) {
  const uint32_t slab = blockIdx.x / a.splits;
  return locate_tile<T>(a, slab, blockIdx.x - slab * a.splits);
}

constexpr int kRowsAhead = 4;  // the ring of four tensors then takes 40 KB

// f(row, raw) over a thread's rows; load(row, raw). Threads whose chunk lies past the last column have no rows.
template <class Raw, bool kReversed, class Real, class Load, class F>
__device__ __forceinline__ void each_row(const ColumnsArgs<Real>& a, const ColumnPlace& p, Load load, F f) {
  const uint32_t end = p.span.hi == 0 ? 0 : a.runs, first = p.split * kColumnRows + p.y, step = a.splits * kColumnRows;
  const uint32_t begin = kReversed ? end - 1 - first : first;  // below 0 is above `end`
  each_ahead<Raw, kColumnThreads, kRowsAhead>(begin, end, kReversed ? 0 - step : step, load, f);
}

// The same over the input, and in fused kernels one tensor `beside` it: f(row, values, what was fetched of `beside`).
template <class T, bool kRagged, bool kReversed, bool kFused, class F>
__device__ __forceinline__ void each_input_row(const ColumnsArgs<RealOf<T>>& a, const ColumnPlace& p,
                                               const FusedTensor& beside, F f) {
  using Raw = InputFetch<T, kFused, kRagged, InShared>;
  const auto load = [&](uint32_t row, Raw& raw) {
    fetch_row<T, kRagged>(a.input, a.at_input, p, row, raw.u);
    fetch_fused<kFused>(RowAt<T, kRagged>{p, row}, beside, raw.beside);
  };
  each_row<Raw, kReversed>(a, p, load, [&](uint32_t row, const Raw& raw) {
    RealOf<T> u[kChunkOf<T>];
    row_values<T, kRagged>(a.input, a.at_input, p, row, raw.u, u);
    f(row, u, raw.beside);
  });
}
template <class T, bool kRagged, bool kReversed, class F>
__device__ __forceinline__ void each_input_row(const ColumnsArgs<RealOf<T>>& a, const ColumnPlace& p, F f) {
  using Nothing = FusedFetch<T, false, kRagged, InShared>;
  each_input_row<T, kRagged, kReversed, false>(
      a, p, a.fused.addend, [&](uint32_t row, RealOf<T> (&u)[kChunkOf<T>], const Nothing&) { f(row, u); });
}

// Writes a block's sums as its partial.
template <class T, int K>
__device__ inline void write_column_partial(const ColumnsArgs<RealOf<T>>& a, RealOf<T> (&v)[K][kChunkOf<T>]) {
  __shared__ RealOf<T> totals[kMaxSums][kTileColumns<T>];
  column_totals<T, K>(v, totals);
  RealOf<T>* partial = a.partial + size_t(blockIdx.x) * kMaxSums * kTileColumns<T>;
  for (int i = int(threadIdx.x); i < K * kTileColumns<T>; i += kColumnThreads)
    partial[i] = totals[i / kTileColumns<T>][i % kTileColumns<T>];
}

// Round 1, as stream_moments(): each column around its own pilot.
template <class T, bool kRagged, bool kFused>
__global__ void __launch_bounds__(kColumnThreads, 4) column_moments(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  __shared__ Real totals[kMaxSums][kTileColumns<T>];
  const ColumnPlace p = locate_column<T>(a);
  Real pilot[2][N] = {};
  const uint32_t first = p.split * kColumnRows + p.y;
  if (p.span.hi > 0 && first < a.runs) {
    read_row<T, kRagged>(a.input, a.at_input, p, first, pilot[0]);
    add_addend<T, kFused>(RowAt<T, kRagged>{p, first}, a.fused, Fetched<T, true>(), pilot[0]);
#pragma unroll
    for (int j = 0; j < N; ++j) pilot[1][j] = Real(1);
  }
  column_totals<T, 2>(pilot, totals);
  Real centre[N], sums[3][N] = {};
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Real count = totals[1][p.x * N + j];
    centre[j] = count > Real(0) ? totals[0][p.x * N + j] / count : Real(0);
  }
  const auto add = [&](uint32_t row, Real (&u)[N], const FusedFetch<T, kFused, kRagged, InShared>& addend) {
    add_and_write_sum<T, kFused>(RowAt<T, kRagged>{p, row}, a.fused, addend, u);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const Real d = u[j] - centre[j];
      sums[0][j] += Real(1);
      sums[1][j] += d;
      sums[2][j] += d * d;
    }
  };
  each_input_row<T, kRagged, false, kFused>(a, p, a.fused.addend, add);
  column_totals<T, 3>(sums, totals);
  Real* partial = a.partial + size_t(blockIdx.x) * kMaxSums * kTileColumns<T>;
  if (p.y > 0) return;
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const int i = int(p.x) * N + j;
    const Real count = totals[0][i], shift = count > Real(0) ? totals[1][i] / count : Real(0);
    partial[i] = count;
    partial[kTileColumns<T> + i] = centre[j];
    partial[2 * kTileColumns<T> + i] = shift;
    partial[3 * kTileColumns<T> + i] = totals[2][i] - totals[1][i] * shift;
  }
}

// Round 2.
template <class T, bool kRagged>
__global__ void __launch_bounds__(kColumnThreads, 4) column_lambda(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  const ColumnPlace p = locate_column<T>(a);
  Real mean[N], rstd[N], shift[N], sums[4][N];
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const uint32_t column = p.column + j < a.columns ? p.column + j : a.columns - 1;
    const Real* stats = a.stats + p.outer * a.inner.divisor + column / a.width;
    mean[j] = stats[int64_t(kMean) * a.groups];
    rstd[j] = stats[int64_t(kRstd) * a.groups];
    shift[j] = -stats[int64_t(kMeanLow) * a.groups] * rstd[j];
  }
  LambdaSums<Real> terms[N];
  each_input_row<T, kRagged, true>(a, p, [&](uint32_t, const Real (&u)[N]) {
#pragma unroll
    for (int j = 0; j < N; ++j) add_lambda_terms(terms[j], (u[j] - mean[j]) * rstd[j] + shift[j]);
  });
  column_lambda_totals(terms, sums);
  write_column_partial<T, 4>(a, sums);
}

// From a row of the input to x times the scale.
template <PrecisionPath kMost, int N, class Real>
__device__ __forceinline__ void reread_row(Real (&x)[N], const ColumnScales<N, Real>& scales,
                                           const ColumnExponents<N, Real>& exponents,
                                           const GroupConstants<Real>* constants, const Real (&scale)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const Real h = scales.standardize(j, x[j]);
    x[j] = signed_as(DeviceLog<Real>::of(absolute(h)), h);
  }
  transform_row<kMost>(x, exponents, constants, scale);
}

// Rounds 3 and 4.
template <class T, bool kRagged, bool kDeviation>
__global__ void __launch_bounds__(kColumnThreads, 4) column_sum_x(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  __shared__ GroupConstants<Real> tile[kTileColumns<T>];
  const ColumnPlace p = locate_column<T>(a);
  load_tile<T>(a, p, tile);
  Real mean[N] = {}, sums[1][N] = {};
  if (kDeviation) {
#pragma unroll
    for (int j = 0; j < N; ++j)
      if (j < p.span.hi) mean[j] = a.mean[p.outer * a.inner.divisor + (p.column + j) / a.width];
  }
  Real ones[N];
#pragma unroll
  for (int j = 0; j < N; ++j) ones[j] = Real(1);
  const ColumnScales<N, Real> scales(tile + p.x * N);
  const ColumnExponents<N, Real> exponents(tile + p.x * N, ones, p.span);
  with_path(exponents.path, [&](auto tag) {
    each_input_row<T, kRagged, kDeviation>(a, p, [&](uint32_t, Real (&x)[N]) {
      reread_row<tag.value>(x, scales, exponents, tile + p.x * N, ones);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[0][j] += kDeviation ? absolute(x[j] - mean[j]) : x[j];
    });
  });
  write_column_partial<T, 1>(a, sums);
}

// Round 5; the only one of a frozen layer without noise.
template <class T, bool kRagged, bool kNoise, bool kFused>
__global__ void __launch_bounds__(kColumnThreads, kNoise && kRagged ? 3 : 4)
column_output(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  __shared__ GroupConstants<Real> tile[kTileColumns<T>];
  const ColumnPlace p = locate_column<T>(a);
  load_tile<T>(a, p, tile);
  const bool noisy = draws_noise<kNoise, kFused>(a);
  const PhiloxSchedule keys(noisy ? uint64_t(*a.seed) : 0);
  Real weight[N], bias[N], noise[N];
  column_parameters<T>(a.weight, a.weight_in_storage, Real(1), p, weight);
  column_parameters<T>(a.bias, a.bias_in_storage, Real(0), p, bias);
  const GroupConstants<Real>* constants = tile + p.x * N;
#pragma unroll
  for (int j = 0; j < N; ++j)
    noise[j] = noisy ? a.noise_train * kNormalUnit<Real> * constants[j].noise_scale * weight[j] : Real(0);
  const ColumnScales<N, Real> scales(constants);
  const ColumnExponents<N, Real> exponents(constants, weight, p.span);
  with_any_path(exponents.path, [&](auto tag) {
    const auto write = [&](uint32_t row, Real (&x)[N], const FusedFetch<T, kFused, kRagged, InShared>& residual) {
      Real z[N] = {};
      if (noisy) row_normals<kRagged>(a, p, row, keys, z);
      reread_row<tag.value>(x, scales, exponents, constants, weight);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = (kNoise ? fused(noise[j], z[j], x[j]) : x[j]) + bias[j];
      apply_epilogue<kFused>(RowAt<T, kRagged>{p, row}, a.fused, residual, x);
      write_row<T, kRagged>(a.output, a.at_output, p, row, x);
    };
    each_input_row<T, kRagged, false, kFused>(a, p, a.fused.residual, write);
  });
}

// kSums: the backward reduction; else the gradient of the input from its totals.
template <class T, bool kRagged, bool kSums, bool kFused>
__global__ void __launch_bounds__(kColumnThreads, kSums || kRagged || kFused ? 2 : 3)
column_gradient(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  using At = RowAt<T, kRagged>;
  constexpr int N = kChunkOf<T>;
  __shared__ GroupConstants<Real> tile[kTileColumns<T>];
  __shared__ InputGradient<Real> gradients[kTileColumns<T>];
  const ColumnPlace p = locate_column<T>(a);
  load_tile<T>(a, p, tile);
  if constexpr (!kSums) {
    for (uint32_t i = threadIdx.x; i < kTileColumns<T>; i += kColumnThreads) {
      const uint32_t column = p.tile * kTileColumns<T> + i;
      if (column >= a.columns) break;
      const size_t group = p.outer * a.inner.divisor + column / a.width;
      gradients[i] = finish_gradient(a.sums + group * kMaxSums, Real(1), a.inverse_count, tile[i].rstd, a.frozen);
    }
    __syncthreads();
  }
  const bool noisy = kSums && a.noise && a.weight_partials != nullptr;
  const PhiloxSchedule keys(noisy ? uint64_t(*a.seed) : 0);
  const GroupConstants<Real>* constants = tile + p.x * N;
  Real weight[N];
  column_parameters<T>(a.weight, a.weight_in_storage, Real(1), p, weight);
  ColumnGradients<kRagged, N, Real> pass(constants, p.span);
  with_path(pass.path, [&](auto tag) {
    using Raw = GradientFetch<T, kFused, !kSums, kRagged, InShared>;
    const auto load = [&](uint32_t row, Raw& raw) {
      fetch_row<T, kRagged>(a.input, a.at_input, p, row, raw.u);
      fetch_row<T, kRagged>(a.grad, a.at_grad, p, row, raw.g);
      fetch_mask<kFused>(At{p, row}, a.fused.activated, raw.activated);
      fetch_fused<kFused && !kSums>(At{p, row}, a.fused.grad_sum, raw.grad_sum);
    };
    each_row<Raw, !kSums>(a, p, load, [&](uint32_t row, const Raw& raw) {
      Real u[N], g[N], z[N] = {};
      row_values<T, kRagged>(a.input, a.at_input, p, row, raw.u, u);
      row_values<T, kRagged>(a.grad, a.at_grad, p, row, raw.g, g);
      mask_gradient<kFused>(At{p, row}, a.fused, raw.activated, g);
      if (noisy) row_normals<kRagged>(a, p, row, keys, z);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        if (kRagged && !p.span.has(j)) continue;
        const Real h = pass.standardize(j, u[j], constants);
        const Real noise = kSums ? gradient_noise(a, constants[j]) : Real(0);
        const Slopes<Real> s = pass.template add<tag.value>(j, h, g[j], weight[j], noise, z[j], constants);
        if constexpr (!kSums) u[j] = gradients[p.x * N + j](s.through_h, s.w, h);
      }
      if constexpr (!kSums) {
        add_sum_gradient<kFused>(At{p, row}, a.fused, raw.grad_sum, u);
        write_row<T, kRagged>(a.output, a.at_output, p, row, u);
      }
    });
  });
  if constexpr (kSums) {
    pass.natural();
    write_column_partial<T, kGradientSums>(a, pass.sums);
  }
}

// The partials of a group: entry i of its columns times splits.
template <class T>
struct ColumnPartials {
  const ColumnsArgs<RealOf<T>>& a;
  uint32_t outer, first;
  __device__ uint32_t entries() const { return a.width * a.splits; }
  __device__ const RealOf<T>* column(uint32_t c, uint32_t split) const {
    const uint32_t tile = (first + c) / kTileColumns<T>, at = (first + c) % kTileColumns<T>;
    return a.partial + (size_t(outer * a.tiles + tile) * a.splits + split) * kMaxSums * kTileColumns<T> + at;
  }
  __device__ RealOf<T> get(uint32_t i, int k) const {
    const uint32_t c = a.width == 1 ? 0 : i / a.splits;
    return column(c, i - c * a.splits)[k * kTileColumns<T>];
  }
};

// One block a group, as stream_finish().
template <class T, Finish kFinish>
__global__ void __launch_bounds__(kFinishThreads) column_finish(const ColumnsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  BlockThreads<Real> threads({});
  const uint32_t group = blockIdx.x, outer = group / a.inner.divisor;
  const ColumnPartials<T> partials = {a, outer, (group - outer * a.inner.divisor) * a.width};
  if constexpr (kFinish == Finish::kMoments) {
    const auto number = [&](uint32_t i, int k) { return partials.get(i, k); };
    finish_moments_of(a, threads, partials.entries(), number, group);
  } else {
    constexpr int K = kFinish == Finish::kLambda ? 4 : kFinish == Finish::kGradient ? 5 : 1;
    Real sums[K] = {};
    for (uint32_t i = threadIdx.x; i < partials.entries(); i += blockDim.x)
#pragma unroll
      for (int k = 0; k < K; ++k) sums[k] += partials.get(i, k);
    threads.sum(sums);
    if (threadIdx.x == 0) finish_sums<kFinish>(a, sums, group, a.mean + group, a.sums + size_t(group) * kMaxSums);
  }
  if constexpr (kFinish == Finish::kGradient) {
    for (uint32_t c = 0; c < a.width; ++c) {
      Real affine[2] = {};
      for (uint32_t split = threadIdx.x; split < a.splits; split += blockDim.x)
#pragma unroll
        for (int k = 0; k < 2; ++k) affine[k] += partials.column(c, split)[(5 + k) * kTileColumns<T>];
      threads.sum(affine);
      if (threadIdx.x > 0) continue;
      const size_t at = size_t(outer) * a.columns + partials.first + c;
      if (a.bias_partials) a.bias_partials[at] = affine[0];
      if (a.weight_partials) a.weight_partials[at] = affine[1];
    }
  }
}

// As stream_leave(); a group is one column, and its sums include the weight.
template <class T>
__global__ void __launch_bounds__(kFinishThreads) column_leave(const ColumnsArgs<RealOf<T>> a, const RoundSums to) {
  const ColumnPartials<T> partials = {a, 0, blockIdx.x};
  const auto number = [&](uint32_t i, int k) { return double(partials.get(i, k)); };
  leave_sums(a, to, partials.entries(), number, blockIdx.x, [](double (&)[kGradientSums]) {});
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
