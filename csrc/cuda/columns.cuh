// The columns layout: a matrix (rows, columns) an outer index, as in channels_last tensors and in (N, C). A group is one
// column, or `length` neighbouring ones. A block takes a tile of columns; a thread takes one chunk of each of its rows.
//
// Neighbouring elements of a chunk belong to different groups, so their constants lie in shared memory, by column.
#pragma once

#include "math.cuh"
#include "reduce.cuh"
#include "rows.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kTileChunks = 8;       // 128 bytes of a row: one cache line
constexpr int kColumnThreads = 128;  // of a block; two to four blocks share a multiprocessor's registers
constexpr int kColumnRows = kColumnThreads / kTileChunks;  // rows that a block reads at a time
constexpr int kColumnWarps = kColumnThreads / 32;
template <class T>
constexpr int kTileColumns = kTileChunks * kChunkOf<T>;

template <class Real>
struct ColumnsArgs : KernelArgs<Real> {
  uint32_t columns, tiles, width;  // of an outer index; columns of a group
  uint32_t splits;                 // blocks a tile, sharing its rows
  Real* partial;                   // [outer][tile][split][kMaxSums][kTileColumns]
  Real* mean;                      // [group]: mean of x, between rounds 3 and 4
  Real* sums;                      // [group][kMaxSums]: backward totals
};

// A tile and a thread's chunk in it; split: which of the tile's blocks this is, where several share its rows.
struct ColumnPlace {
  uint32_t outer, tile, split, x, y, column;
  Span span;
};

template <class T>
__device__ inline ColumnPlace locate_tile(const ColumnsArgs<RealOf<T>>& a, uint32_t slab, uint32_t split = 0) {
  constexpr int N = kChunkOf<T>;
  ColumnPlace p;
  p.split = split;
  p.outer = slab / a.tiles;
  p.tile = slab - p.outer * a.tiles;
  p.x = threadIdx.x % kTileChunks;
  p.y = threadIdx.x / kTileChunks;
  p.column = p.tile * kTileColumns<T> + p.x * N;
  const int left = int(a.columns) - int(p.column);
  p.span = {0, left < 0 ? 0 : left < N ? left : N};
  return p;
}

template <class T>
__device__ inline const T* row_address(const void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row) {
  return static_cast<const T*>(tensor) + int64_t(p.outer) * s.outer + int64_t(row) * s.run + p.column;
}

template <class T, bool kRagged>
__device__ inline void read_row(const void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                RealOf<T> (&out)[kChunkOf<T>]) {
  if constexpr (kRagged) load_span(row_address<T>(tensor, s, p, row), p.span, out);
  else load_chunk(row_address<T>(tensor, s, p, row), out);
}
template <class T, bool kRagged>
__device__ inline void write_row(void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                 const RealOf<T> (&in)[kChunkOf<T>]) {
  T* at = const_cast<T*>(row_address<T>(tensor, s, p, row));
  if constexpr (kRagged) store_span(at, p.span, in);
  else store_chunk(at, in);
}

// A row's first element in the order of the noise.
__device__ inline int64_t row_position(const Strides& s, const ColumnPlace& p, uint32_t row) {
  return int64_t(p.outer) * s.outer + int64_t(row) * s.run;
}

// The standard normals of a chunk of a row, without kNormalUnit.
template <bool kRagged, int N, class Real>
__device__ __forceinline__ void row_normals(const KernelArgs<Real>& a, const ColumnPlace& p, uint32_t row,
                                            const PhiloxSchedule& keys, Real (&z)[N]) {
  const GroupPlace origin = {0, 0, 0, 0, 0, row_position(a.at_noise, p, row), 0};
  const ChunkPlace chunk = {0, 0, p.column, p.span, false};
  if constexpr (kRagged) {
    unaligned_normals<N>(a, origin, chunk, keys, z);
  } else {
    each_normal_pair<N, true>(a, origin, chunk, keys, [&](int j, const PolarPair<Real>& pair) {
      z[j] = pair.radius * pair.cos;
      z[j + 1] = pair.radius * pair.sin;
    });
  }
}

// fetch() and values() of this layout.
template <class T, bool kRagged, bool kLate, class Place>
__device__ __forceinline__ void fetch_row(const void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                          Fetched<T, kLate, Place>& out) {
  if constexpr (!kLate) out.load(row_address<T>(tensor, s, p, row));
}
template <class T, bool kRagged, bool kLate, class Place>
__device__ __forceinline__ void row_values(const void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                           const Fetched<T, kLate, Place>& fetched, RealOf<T> (&out)[kChunkOf<T>]) {
  if constexpr (kLate) read_row<T, kRagged>(tensor, s, p, row, out);
  else unpack_chunk<T>(fetched.get(), out);
}

// The `at` of epilogue.cuh: a row's place in any tensor.
template <class T, bool kRagged>
struct RowAt {
  const ColumnPlace& p;
  uint32_t row;

  template <bool kLate, class Place>
  __device__ __forceinline__ void fetch(const FusedTensor& t, Fetched<T, kLate, Place>& out) const {
    fetch_row<T, kRagged>(t.data, t.at, p, row, out);
  }
  template <bool kLate, class Place>
  __device__ __forceinline__ void values(const FusedTensor& t, const Fetched<T, kLate, Place>& fetched,
                                         RealOf<T> (&out)[kChunkOf<T>]) const {
    row_values<T, kRagged>(t.data, t.at, p, row, fetched, out);
  }
  __device__ __forceinline__ void write(const FusedTensor& t, const RealOf<T> (&in)[kChunkOf<T>]) const {
    write_row<T, kRagged>(t.data, t.at, p, row, in);
  }
};

// Sums each column over the threads of a block: totals[k][column of the tile], visible to all threads.
template <class T, int K>
__device__ inline void column_totals(RealOf<T> (&v)[K][kChunkOf<T>], RealOf<T> (&totals)[kMaxSums][kTileColumns<T>]) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  __shared__ Real partial[kColumnWarps][K][kTileColumns<T>];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int offset = 16; offset >= kTileChunks; offset >>= 1) v[k][j] += __shfl_xor_sync(kAllLanes, v[k][j], offset);
      if (lane < kTileChunks) partial[warp][k][lane * N + j] = v[k][j];
    }
  __syncthreads();
  for (int i = int(threadIdx.x); i < K * kTileColumns<T>; i += kColumnThreads) {
    Real total = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) total += partial[w][i / kTileColumns<T>][i % kTileColumns<T>];
    totals[i / kTileColumns<T>][i % kTileColumns<T>] = total;
  }
  __syncthreads();
}

// Loads the constants of a tile's columns into shared memory.
template <class T>
__device__ inline void load_tile(const ColumnsArgs<RealOf<T>>& a, const ColumnPlace& p,
                                 GroupConstants<RealOf<T>> (&constants)[kTileColumns<T>]) {
  for (uint32_t i = threadIdx.x; i < kTileColumns<T>; i += kColumnThreads) {
    const uint32_t column = p.tile * kTileColumns<T> + i;
    if (column >= a.columns) break;
    const uint32_t group = p.outer * a.inner.divisor + column / a.width;
    constants[i] = load_constants(a.stats, group, a.groups, a.settings, a.frozen);
  }
  __syncthreads();
}

// A thread runs the code of the most precise path among its columns; within it each column still takes its own path, so
// that no result depends on neighbours. The columns' exponents are in registers: a load from shared memory would take
// longer than an element's arithmetic.
template <int N, class Real>
struct ColumnExponents {
  SignedExponent<Real> of[N];
  PrecisionPath path = PrecisionPath::kPlain;  // the most precise of all columns'

  // scale: of each column
  __device__ __forceinline__ ColumnExponents(const GroupConstants<Real>* constants, const Real (&scale)[N], Span span) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      of[j] = signed_exponent(constants[j].exponents, scale[j]);
      if (j < span.hi && constants[j].path > path) path = constants[j].path;
    }
  }
};

template <int N, class Real>
struct ColumnScales {
  Real mean[N], rstd[N], shift[N];

  __device__ __forceinline__ explicit ColumnScales(const GroupConstants<Real>* constants) {
#pragma unroll
    for (int j = 0; j < N; ++j) mean[j] = constants[j].mean, rstd[j] = constants[j].rstd, shift[j] = constants[j].shift;
  }
  __device__ Real standardize(int j, Real u) const { return fused(u - mean[j], rstd[j], shift[j]); }
};

// From signed logarithms to x times the scale.
template <PrecisionPath kMost, int N, class Real>
__device__ __forceinline__ void transform_row(Real (&x)[N], const ColumnExponents<N, Real>& exponents,
                                              const GroupConstants<Real>* constants, const Real (&scale)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    if constexpr (kMost == PrecisionPath::kSeries) {
      const GroupConstants<Real>& c = constants[opaque(j)];  // reloaded: the registers hold plain columns
      if (c.path == PrecisionPath::kSeries) {
        x[j] = transform_round<PrecisionPath::kSeries>(x[j], c.exponents) * scale[j];
      } else {
        const SignedExponent<Real> s = signed_exponent(c.exponents, scale[j]);
        x[j] = c.path == PrecisionPath::kBounded ? plain_power_psi<true>(x[j], s.inverse(x[j]), s.tilt).psi
                                        : plain_power_psi<false>(x[j], s.inverse(x[j]), s.tilt).psi;
      }
    } else {
      const SignedExponent<Real>& s = exponents.of[j];
      x[j] = plain_power_psi<kMost == PrecisionPath::kBounded>(x[j], s.inverse(x[j]), s.tilt).psi;
    }
  }
}

// The weight (or bias) of a chunk's columns.
template <class T, class Real>
__device__ inline void column_parameters(const void* data, bool in_storage, Real missing, const ColumnPlace& p,
                                         Real (&out)[kChunkOf<T>]) {
#pragma unroll
  for (int j = 0; j < kChunkOf<T>; ++j)
    out[j] = data != nullptr && j < p.span.hi ? load_parameter<T>(data, in_storage, p.column + j) : missing;
}

// The backward reduction of a thread's columns: gradient_round() with constants in registers. Ragged kernels, which have
// fewer registers left, read some of them from shared memory.
template <bool kRagged, int N, class Real>
struct ColumnGradients {
  ColumnScales<N, Real> scales;
  SignedExponent<Real> exponent[N];
  LambdaGradient<Real> lmbda[N];
  PrecisionPath path = PrecisionPath::kPlain;
  Real sums[kGradientSums][N] = {};

  __device__ __forceinline__ ColumnGradients(const GroupConstants<Real>* constants, Span span) : scales(constants) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      exponent[j] = gradient_exponent(constants[j].exponents);
      lmbda[j] = constants[j].lmbda;
      if (j < span.hi && constants[j].path > path) path = constants[j].path;
    }
  }

  __device__ Real standardize(int j, Real u, const GroupConstants<Real>* constants) const {
    return kRagged ? constants[j].standardize(u) : scales.standardize(j, u);
  }

  // noise: the scale of the normal z. weight: 1 where finish_gradient() multiplies by it, which a weight that varies within
  // the group does not allow.
  template <PrecisionPath kMost>
  __device__ __forceinline__ Slopes<Real> add(int j, Real h, Real g, Real weight, Real noise, Real z,
                                              const GroupConstants<Real>* constants) {
    const LambdaGradient<Real>& line = kRagged ? constants[j].lmbda : lmbda[j];
    Real terms[5] = {sums[0][j], sums[1][j], sums[2][j], sums[3][j], sums[4][j]};
    constexpr bool kPlain = kMost == PrecisionPath::kPlain;
    const GroupConstants<Real>& c = constants[kPlain ? uint32_t(j) : opaque(j)];  // reloaded, as in transform_row()
    const SignedExponent<Real> plain = kPlain ? exponent[j] : gradient_exponent(c.exponents);
    const Slopes<Real> s = gradient_round(kPlain ? kMost : c.path, h, g * weight, plain, c.exponents, line, terms);
#pragma unroll
    for (int i = 0; i < 5; ++i) sums[i][j] = terms[i];
    sums[5][j] += g;
    sums[6][j] = fused(g, fused(noise, z, s.x), sums[6][j]);
    return s;
  }
  __device__ __forceinline__ void natural() {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      Real column[kGradientSums];
#pragma unroll
      for (int k = 0; k < kGradientSums; ++k) column[k] = sums[k][j];
      natural_sums(column);
      sums[2][j] = column[2], sums[6][j] = column[6];
    }
  }
};

// The scale of a unit normal that is added to x in the unit of the logarithms.
template <class Real>
__device__ inline Real gradient_noise(const KernelArgs<Real>& a, const GroupConstants<Real>& c) {
  return a.noise_train * c.noise_scale * (kNormalUnit<Real> / DeviceLog<Real>::kUnit);
}

template <int N, class Real>
__device__ __forceinline__ void column_lambda_totals(const LambdaSums<Real> (&terms)[N], Real (&sums)[4][N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    Real totals[4];
    lambda_totals(terms[j], totals);
#pragma unroll
    for (int k = 0; k < 4; ++k) sums[k][j] = totals[k];
  }
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
