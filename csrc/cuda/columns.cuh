// The columns walk: a matrix (rows, columns) an outer index, as in channels_last tensors and in (N, C). A group is one
// column, or `length` neighbouring ones. Blocks take tiles of columns; a thread takes one chunk of a row of its tile.
//
// Neighbouring elements of a chunk belong to different groups, so their constants lie in shared memory, by column.
#pragma once

#include "rounds.cuh"
#include "rows.cuh"
#include "team.cuh"

namespace normnorm {
namespace cuda {
namespace {

constexpr int kTileChunks = 8;       // 128 bytes of a row: one line of memory
constexpr int kColumnThreads = 256;
constexpr int kColumnRows = kColumnThreads / kTileChunks;  // rows that a block reads at a time
constexpr int kColumnWarps = kColumnThreads / 32;
template <class T>
constexpr int kTileColumns = kTileChunks * kChunkOf<T>;

template <class Real>
struct ColumnsArgs {
  RowsArgs<Real> walk;
  uint32_t columns, tiles, width;  // of an outer index; columns of a group
  uint32_t splits;                 // blocks a tile, sharing its rows
  Real* part;                      // [outer][tile][split][kMaxSums][kTileColumns]
  Real* mean;                      // [group]: mean of x, between rounds 3 and 4
  Real* sums;                      // [group][kMaxSums]: backward totals
};

// A block's tile and a thread's chunk in it.
struct ColumnPlace {
  uint32_t outer, tile, split, x, y, column;
  Span span;
};

template <class T, bool kRagged>
__device__ inline ColumnPlace locate_column(const ColumnsArgs<RealOf<T>>& a) {
  constexpr int N = kChunkOf<T>;
  ColumnPlace p;
  const uint32_t slab = blockIdx.x / a.splits;
  p.split = blockIdx.x - slab * a.splits;
  p.outer = slab / a.tiles;
  p.tile = slab - p.outer * a.tiles;
  p.x = threadIdx.x % kTileChunks;
  p.y = threadIdx.x / kTileChunks;
  p.column = p.tile * kTileColumns<T> + p.x * N;
  const int left = int(a.columns) - int(p.column);
  p.span = {0, left < 0 ? 0 : left < N ? left : N};
  return p;
}

template <class T, bool kRagged>
__device__ inline void read_row(const void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                RealOf<T> (&out)[kChunkOf<T>]) {
  const T* at = static_cast<const T*>(tensor) + p.outer * s.outer + row * s.run + p.column;
  if constexpr (kRagged) load_span(at, p.span, out);
  else load_chunk(at, out);
}
template <class T, bool kRagged>
__device__ inline void write_row(void* tensor, const Strides& s, const ColumnPlace& p, uint32_t row,
                                 const RealOf<T> (&in)[kChunkOf<T>]) {
  T* at = static_cast<T*>(tensor) + p.outer * s.outer + row * s.run + p.column;
  if constexpr (kRagged) store_span(at, p.span, in);
  else store_chunk(at, in);
}

template <bool kRagged, int N, class Real>
__device__ __forceinline__ void row_normals(const RowsArgs<Real>& a, const ColumnPlace& p, uint32_t row, const PhiloxSchedule& keys,
                                            Real (&z)[N]) {
  const int64_t start = p.outer * a.at_noise.outer + row * a.at_noise.run;
  const GroupPlace origin = {0, 0, 0, 0, 0, start, 0};
  const ChunkPlace chunk = {0, p.column, p.span, false};
  if constexpr (kRagged) unaligned_normals<N>(a, origin, chunk, keys, z);
  else chunk_normals<N>(a, origin, chunk, keys, z);
}

// f(row) over a thread's rows. Threads whose chunk lies past the last column have none.
template <class Real, class F>
__device__ __forceinline__ void each_row(const ColumnsArgs<Real>& a, const ColumnPlace& p, F f) {
  if (p.span.hi == 0) return;
#pragma unroll 1
  for (uint32_t row = p.split * kColumnRows + p.y; row < a.walk.runs; row += a.splits * kColumnRows) f(row);
}

// Adds up what the threads of a block have for each column: totals[k][column of the tile], seen by all threads.
template <class T, int K>
__device__ inline void column_totals(RealOf<T> (&v)[K][kChunkOf<T>], RealOf<T> (&totals)[kMaxSums][kTileColumns<T>]) {
  using Real = RealOf<T>;
  constexpr int N = kChunkOf<T>;
  __shared__ Real part[kColumnWarps][K][kTileColumns<T>];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int k = 0; k < K; ++k)
#pragma unroll
    for (int j = 0; j < N; ++j) {
#pragma unroll
      for (int offset = 16; offset >= kTileChunks; offset >>= 1) v[k][j] += __shfl_xor_sync(kAllLanes, v[k][j], offset);
      if (lane < kTileChunks) part[warp][k][lane * N + j] = v[k][j];
    }
  __syncthreads();
  for (int i = int(threadIdx.x); i < K * kTileColumns<T>; i += kColumnThreads) {
    Real total = 0;
#pragma unroll
    for (int w = 0; w < kColumnWarps; ++w) total += part[w][i / kTileColumns<T>][i % kTileColumns<T>];
    totals[i / kTileColumns<T>][i % kTileColumns<T>] = total;
  }
  __syncthreads();
}

// A block's sums as its part of the tile's.
template <class T, int K>
__device__ inline void write_column_part(const ColumnsArgs<RealOf<T>>& a, const ColumnPlace& p,
                                         RealOf<T> (&v)[K][kChunkOf<T>]) {
  __shared__ RealOf<T> totals[kMaxSums][kTileColumns<T>];
  column_totals<T, K>(v, totals);
  RealOf<T>* part = a.part + size_t(blockIdx.x) * kMaxSums * kTileColumns<T>;
  for (int i = int(threadIdx.x); i < K * kTileColumns<T>; i += kColumnThreads)
    part[i] = totals[i / kTileColumns<T>][i % kTileColumns<T>];
}

// The constants of a tile's columns, into shared memory.
template <class T>
__device__ inline void load_tile(const ColumnsArgs<RealOf<T>>& a, const ColumnPlace& p,
                                 GroupConstants<RealOf<T>> (&constants)[kTileColumns<T>]) {
  const RowsArgs<RealOf<T>>& w = a.walk;
  for (uint32_t i = threadIdx.x; i < kTileColumns<T>; i += kColumnThreads) {
    const uint32_t column = p.tile * kTileColumns<T> + i;
    if (column >= a.columns) break;
    const uint32_t group = p.outer * w.inner.divisor + column / a.width;
    constants[i] = load_constants(w.stats, group, w.groups, w.alpha, w.order, w.transform_eps, w.frozen);
  }
  __syncthreads();
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
