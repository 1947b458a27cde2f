// The columns layout: matrices of rows x columns whose groups are columns or a few neighbouring columns (channels_last
// tensors, and tensors without spatial axes).
//
// The lanes of a vector are neighbouring columns, each with its own group's constants; no shuffling is needed. A matrix
// is cut into chunks of rows. The chunks' sums per column are added in order, then those of the columns of a group.
#pragma once

#include "epilogue.h"
#include "noise.h"
#include "reduce.h"

namespace normnorm {
namespace {

// Rows of a table of constants per column.
enum ColumnRow : int {
  kColMean,
  kColRstd,
  kColShift,
  kColEtaPos,
  kColEtaNeg,
  kColInversePos,
  kColInverseNeg,
  kColActivePos,
  kColActiveNeg,
  kColCentre,
  kColNoise,
  kColWeight,
  kColBias,
  kColCe,
  kColCr,
  kColCo,
  kColTwoD,
  kColDirect,
  kColLmbda,
  kColOffset,
  kColSlope,
  kColumnRows
};

// The part of a strip from a row and a column on; null stays null.
template <class T>
NN_HD Strip<T> at(const Strip<T>& s, int64_t row, int64_t column) {
  return {s.data ? s.data + row * s.step + column : nullptr, s.step};
}

// A tile is rows that are processed strip by strip while they are in the cache: kTileElements elements, or more where a
// pass asks for a number of rows that kWideTile elements hold.
constexpr int64_t kTileElements = 2048, kWideTile = 1 << 18;
// Most elements, over all threads, that are cached in scratch memory. kSmallMatrix: w, in the backward pass.
// kScratchMatrix: half types, in the forward pass; a quarter of it in the backward pass, which saves less. The C library
// keeps freed memory of this size for the next call.
constexpr int64_t kSmallMatrix = 1 << 17, kScratchMatrix = (1 << 23) - 4096;

// Access to the chunks, tiles and strips of a problem in the columns layout.
template <class T>
class ColumnLayout {
 public:
  using V = VectorOf<T>;

  ColumnLayout(const cpu::Problem& p, int64_t tile_rows)
      : p_(p),
        g_(p.geometry),
        half_(stored_as_half(p.storage)),
        columns_(g_.inner * g_.length),
        padded_(ceil_div(columns_, kLanes<V>) * kLanes<V>),
        chunk_(clamped(16384 / (columns_ > 0 ? columns_ : 1), 64, 1024)),
        chunks_(ceil_div(g_.runs, chunk_)) {
    noise_ = {p.seed, p.noise.stream, p.noise};
    const int64_t columns = columns_ > 0 ? columns_ : 1;
    tile_ = clamped(smaller(tile_rows, kWideTile / columns), clamped(kTileElements / columns, 1, kTileElements),
                    kTileElements);
  }

  int64_t columns() const { return columns_; }
  int64_t padded() const { return padded_; }
  int64_t chunks() const { return chunks_; }
  int64_t chunk_begin(int64_t chunk) const { return chunk * chunk_; }
  int64_t chunk_end(int64_t chunk) const { return smaller((chunk + 1) * chunk_, g_.runs); }
  int64_t chunk_rows(int64_t chunk) const { return chunk_end(chunk) - chunk_begin(chunk); }
  bool split_matrix() const { return g_.outer < 2 * int64_t(p_.pool.threads); }
  int64_t normal_size() const { return tile_ * columns_ + kNoiseSlack; }

  // A chunk's elements in the compute dtype: in place, or converted to `buffer` of buffer_size() elements.
  Strip<const T> source(const Operand& of, int64_t outer, int64_t chunk, T* buffer) const {
    const int64_t first = chunk_begin(chunk);
    if (!half_) return {static_cast<const T*>(of.data) + locate(of, outer, first), of.stride.run};
    for (int64_t r = first; r < chunk_end(chunk); ++r)
      load_run(p_.storage, of.data, locate(of, outer, r), buffer + (r - first) * columns_, columns_);
    return {buffer, columns_};
  }
  // Where to write a chunk in the compute dtype, in place or to `buffer`; store() then converts the buffer.
  Strip<T> target(const Operand& of, int64_t outer, int64_t chunk, T* buffer) const {
    if (half_) return {buffer, columns_};
    return {static_cast<T*>(of.data) + locate(of, outer, chunk_begin(chunk)), of.stride.run};
  }
  void store(const Operand& of, int64_t outer, int64_t chunk, const T* buffer) const {
    if (!half_) return;
    const int64_t first = chunk_begin(chunk);
    for (int64_t r = first; r < chunk_end(chunk); ++r)
      store_run(p_.storage, of.data, locate(of, outer, r), buffer + (r - first) * columns_, columns_);
  }
  // sum = input + addend
  void add_addend(int64_t outer, int64_t chunk) const {
    Buffer<T> u_buffer(buffer_size()), addend_buffer(buffer_size()), sum_buffer(buffer_size());
    const auto u = source(p_.input, outer, chunk, u_buffer.data());
    const auto a = source(p_.addend, outer, chunk, addend_buffer.data());
    const auto sum = target(p_.sum, outer, chunk, sum_buffer.data());
    for (int64_t r = 0; r < chunk_rows(chunk); ++r)
      add_row(sum.data + r * sum.step, u.data + r * u.step, a.data + r * a.step, columns_);
    store(p_.sum, outer, chunk, sum_buffer.data());
  }

  // The chunk's residual; null where there is none.
  Strip<const T> residual(int64_t outer, int64_t chunk, T* buffer) const {
    return p_.residual.data ? source(p_.residual, outer, chunk, buffer) : Strip<const T>{nullptr, 0};
  }

  void apply_epilogue(Strip<T> out, Strip<const T> residual, int64_t rows) const {
    if (!has_epilogue(p_)) return;
    for (int64_t r = 0; r < rows; ++r)
      epilogue_row(p_, out.data + r * out.step, residual.data ? residual.data + r * residual.step : nullptr,
                   columns_);
  }

  // The chunk's gradient before the activation; `buffer` has gradient_size() elements.
  Strip<const T> gradient(int64_t outer, int64_t chunk, T* buffer) const {
    const auto g = source(p_.grad_output, outer, chunk, buffer);
    if (!has_activation(p_)) return g;
    Buffer<T> output_buffer(buffer_size());
    const auto y = source(p_.activated, outer, chunk, output_buffer.data());
    for (int64_t r = 0; r < chunk_rows(chunk); ++r)
      mask_row(p_.activation, buffer + r * columns_, g.data + r * g.step, y.data + r * y.step, columns_);
    return {buffer, columns_};
  }
  int64_t gradient_size() const { return has_activation(p_) ? smaller(chunk_, g_.runs) * columns_ : buffer_size(); }

  void add_sum_gradient(int64_t outer, int64_t chunk, Strip<T> out) const {
    if (!p_.grad_sum.data) return;
    Buffer<T> buffer(buffer_size());
    const auto g = source(p_.grad_sum, outer, chunk, buffer.data());
    for (int64_t r = 0; r < chunk_rows(chunk); ++r)
      add_row(out.data + r * out.step, out.data + r * out.step, g.data + r * g.step, columns_);
  }

  int64_t buffer_size() const { return half_ ? smaller(chunk_, g_.runs) * columns_ : 0; }

  // Whether the tensor that will be written can cache intermediate values, which half types cannot hold.
  bool caches(const Operand& to) const { return !half_ && to.data; }

  // Whether a matrix of size() elements has its cache in scratch memory, which one round alone cannot leave to the next.
  bool scratched(int64_t most) const {
    return p_.round == Round::kAll && size() * (split_matrix() ? 1 : p_.pool.threads) <= most;
  }
  int64_t size() const { return g_.runs * columns_; }
  Strip<T> scratch(T* data, int64_t chunk) const { return at(Strip<T>{data, columns_}, chunk_begin(chunk), 0); }

  // body(partial, column, lanes) for each strip of columns.
  template <class F>
  NN_HD void for_strips(F body) const {
    int64_t c = 0;
    for (; c + kLanes<V> <= columns_; c += kLanes<V>) body(std::false_type(), c, kLanes<V>);
    if (c < columns_) body(std::true_type(), c, int(columns_ - c));
  }

  // body(partial, row, rows, column, lanes) for each strip of each tile of a chunk: nearly in the order of memory.
  template <class F>
  NN_HD void for_tile_strips(int64_t chunk, F body) const {
    for (int64_t r = 0; r < chunk_rows(chunk); r += tile_) {
      const int64_t rows = smaller(tile_, chunk_rows(chunk) - r);
      for_strips([&](auto partial, int64_t c, int lanes) { body(partial, r, rows, c, lanes); });
    }
  }

  // body(row, rows, normals) for each tile of a chunk; `row` counts from the chunk's first. `buffer` has normal_size()
  // elements.
  template <class F>
  void for_tiles(int64_t outer, int64_t chunk, bool noisy, T* buffer, F body) const {
    for (int64_t r = 0; r < chunk_rows(chunk); r += tile_) {
      const int64_t rows = smaller(tile_, chunk_rows(chunk) - r), row = chunk_begin(chunk) + r;
      const int64_t position = outer * p_.noise.position.outer + row * p_.noise.position.run;
      body(r, rows, noisy ? normals(buffer, position, rows * columns_, noise_) : nullptr);
    }
  }

  // One row of the constants of all columns of a matrix; `table` has kColumnRows rows of padded() values.
  T* column(T* table, ColumnRow row) const { return table + row * padded_; }

  NN_HD V vector(const T* table, ColumnRow row, int64_t c) const {
    return load_dense<V>(table + row * padded_ + c);
  }

  NN_HD TransformConstants<V> transform(const T* t, int64_t c) const {
    return {{vector(t, kColMean, c), vector(t, kColRstd, c), vector(t, kColShift, c)},
            {vector(t, kColEtaPos, c), vector(t, kColEtaNeg, c), vector(t, kColInversePos, c),
             vector(t, kColInverseNeg, c), vector(t, kColActivePos, c), vector(t, kColActiveNeg, c)}};
  }

  // Copies every group's constants of the transform to its columns.
  void spread_transform(T* table, int64_t outer) const {
    for (int64_t i = 0; i < g_.inner; ++i) {
      const auto c = GroupStats<T>(p_, outer * g_.inner + i).transform(p_);
      const T values[9] = {c.standardize.mean,      c.standardize.rstd,     c.standardize.shift,
                           c.exponents.eta_pos,     c.exponents.eta_neg,    c.exponents.inverse_pos,
                           c.exponents.inverse_neg, c.exponents.active_pos, c.exponents.active_neg};
      for (int k = 0; k < 9; ++k) spread(table, ColumnRow(kColMean + k), i, values[k]);
    }
  }
  void spread(T* table, ColumnRow row, int64_t group, T value) const {
    T* at = column(table, row) + group * g_.length;
    for (int64_t j = 0; j < g_.length; ++j) at[j] = value;
  }

  // reduce_parts() for vectors of sums: part(chunk, sums) adds a chunk's to kCount rows of padded() zeros; `totals`
  // receives their sum over the chunks, in order, in double.
  template <int kCount, class F>
  void reduce_chunks(bool parallel, double* totals, F part) const {
    const int64_t width = kCount * padded_;
    const bool together = parallel && p_.pool.threads > 1 && chunks_ > 1;
    Buffer<T> parts(together ? chunks_ * width : width);
    memset(totals, 0, size_t(width) * sizeof(double));
    const auto add = [&](const T* sums) {
      for (int64_t i = 0; i < width; ++i) totals[i] += double(sums[i]);
    };
    for_range(p_.pool, together, chunks_, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        T* sums = parts.data() + (together ? chunk * width : 0);
        memset(static_cast<void*>(sums), 0, size_t(width) * sizeof(T));
        part(chunk, sums);
        if (!together) add(sums);
      }
    });
    if (!together) return;
    for (int64_t chunk = 0; chunk < chunks_; ++chunk) add(parts.data() + chunk * width);
  }

  // The sum over a group's columns of one row of totals, each times its factor where factors are given.
  double group_total(const double* totals, int row, int64_t group, const T* factor = nullptr) const {
    double sum = 0;
    for (int64_t j = group * g_.length; j < (group + 1) * g_.length; ++j)
      sum += totals[row * padded_ + j] * (factor ? double(factor[j]) : 1.0);
    return sum;
  }

 private:
  int64_t locate(const Operand& of, int64_t outer, int64_t row) const {
    return outer * of.stride.outer + row * of.stride.run;
  }

  const cpu::Problem& p_;
  const Geometry& g_;
  const bool half_;
  int64_t columns_, padded_, chunk_, chunks_, tile_;
  NoiseSource noise_;
};

}  // namespace
}  // namespace normnorm
