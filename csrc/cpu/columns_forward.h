// The forward pass in the columns layout.
#pragma once

#include "columns.h"

namespace normnorm {
namespace {

template <class T>
class ColumnForward {
 public:
  using V = VectorOf<T>;

  explicit ColumnForward(const cpu::Problem& p)
      : layout_(p, p.frozen ? kTile : 8),
        p_(p),
        g_(p.geometry),
        cached_(!p.frozen && (layout_.caches(p.output) || layout_.scratched(kScratchMatrix))) {}

  void run() {
    const bool split = layout_.split_matrix();
    for_range(p_.pool, !split, g_.outer, [&](int64_t begin, int64_t end) {
      Buffer<T> table(kColumnRows * layout_.padded());
      Buffer<double> totals(4 * layout_.padded()), variances(g_.inner);
      Buffer<T> scratch(cached_ && !layout_.caches(p_.output) ? layout_.size() : 0);
      table.zero(kColumnRows * layout_.padded());
      for (int64_t o = begin; o < end; ++o)
        forward(o, split, table.data(), totals.data(), variances.data(), scratch.data());
    });
  }

 private:
  void forward(int64_t outer, bool split, T* table, double* totals, double* variances, T* scratch) {
    if (p_.runs(Round::kMoments)) moments_round(outer, split, variances);
    layout_.spread_transform(table, outer);
    if (p_.runs(Round::kLambda)) {
      lambda_round(outer, split, table, totals, variances, scratch);
      layout_.spread_transform(table, outer);
    }
    if (p_.runs(Round::kMeanX)) mean_x_round(outer, split, table, totals, scratch);
    if (p_.runs(Round::kDeviation)) deviation_round(outer, split, table, totals, scratch);
    if (p_.runs(Round::kOutput)) output_round(outer, split, table, scratch);
  }

  // A chunk's columns are summed around its first row, then around the mean that this gives, rounded.
  void moments_round(int64_t outer, bool split, double* variances) {
    const int64_t padded = layout_.padded();
    Buffer<Moments> parts(layout_.chunks() * g_.inner);
    for_range(p_.pool, split, layout_.chunks(), [&](int64_t begin, int64_t end) {
      Buffer<T> sums(3 * padded), buffer(layout_.buffer_size());
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        if (p_.addend.data) layout_.add_addend(outer, chunk);
        sums.zero(3 * padded);
        moments_chunk(layout_.source(normalized(p_), outer, chunk, buffer.data()), chunk, sums.data());
        const double rows = double(layout_.chunk_end(chunk) - layout_.chunk_begin(chunk));
        for (int64_t i = 0; i < g_.inner; ++i) {
          Moments group;
          for (int64_t c = i * g_.length; c < (i + 1) * g_.length; ++c)
            group = merge(group, recentred_moments(rows, double(sums[c]), double(sums[padded + c]),
                                                   double(sums[2 * padded + c])));
          parts[chunk * g_.inner + i] = group;
        }
      }
    });
    for (int64_t i = 0; i < g_.inner; ++i) {
      Moments group;
      for (int64_t chunk = 0; chunk < layout_.chunks(); ++chunk)
        group = merge(group, parts[chunk * g_.inner + i]);
      if (left_to_caller<3>(p_, outer * g_.inner + i, {{group.mean, group.low, group.m2}})) continue;
      GroupStats<T> stats(p_, outer * g_.inner + i);
      stats.set_moments(group, p_.settings.eps);
      stats.set(kLmbda, 1);
      variances[i] = group.m2 / group.count;
    }
  }

  // Adds to three rows of zeros.
  void moments_chunk(Strip<const T> u, int64_t chunk, T* sums) const {
    const int64_t padded = layout_.padded();
    const T each = T(1.0 / double(layout_.chunk_rows(chunk)));
    layout_.for_tile_strips(chunk, [&](auto partial, int64_t row, int64_t rows, int64_t c, int lanes) {
      const V pilot = read<partial.value, V>(u.data + c, lanes);
      add_dense<V>(sums + c, sum_pass<partial.value, V>(at(u, row, c), rows, lanes, pilot));
    });
    layout_.for_strips([&](auto partial, int64_t c, int lanes) {
      store_dense<V>(sums + c, read<partial.value, V>(u.data + c, lanes) + load_dense<V>(sums + c) * each);
    });
    layout_.for_tile_strips(chunk, [&](auto partial, int64_t row, int64_t rows, int64_t c, int lanes) {
      const auto s = centred_pass<partial.value, V>(at(u, row, c), rows, lanes, load_dense<V>(sums + c));
      add_dense<V>(sums + padded + c, s.sum);
      add_dense<V>(sums + 2 * padded + c, s.squares);
    });
  }

  void lambda_round(int64_t outer, bool split, const T* table, double* totals, const double* variances,
                    T* scratch) {
    layout_.template reduce_chunks<4>(split, totals, [&](int64_t chunk, T* sums) {
      Buffer<T> buffer(layout_.buffer_size());
      const auto u = layout_.source(normalized(p_), outer, chunk, buffer.data());
      const auto cache = cache_strip(outer, chunk, scratch);
      layout_.for_tile_strips(chunk, [&](auto partial, int64_t row, int64_t rows, int64_t c, int lanes) {
        LambdaSums<V> s;
        const auto h = layout_.transform(table, c).standardize;
        cached_ ? lambda_pass<partial.value, true, V>(at(u, row, c), at(cache, row, c), rows, lanes, h, s)
                : lambda_pass<partial.value, false, V>(at(u, row, c), {nullptr, 0}, rows, lanes, h, s);
        const LambdaTerms<V> total = s.totals(1);
        const V terms[4] = {total.hd, total.log, total.d, total.e};
        for (int k = 0; k < 4; ++k) add_dense<V>(sums + k * layout_.padded() + c, terms[k]);
      });
    });
    for (int64_t i = 0; i < g_.inner; ++i) {
      const Sums<4> sums{{layout_.group_total(totals, 0, i), layout_.group_total(totals, 1, i),
                          layout_.group_total(totals, 2, i), layout_.group_total(totals, 3, i)}};
      if (left_to_caller(p_, outer * g_.inner + i, sums)) continue;
      GroupStats<T>(p_, outer * g_.inner + i).set_lambda(sums, double(g_.group_size()), variances[i], p_);
    }
  }

  // The chunk's cache: its part of the output or, for half types, of the scratch memory.
  Strip<T> cache_strip(int64_t outer, int64_t chunk, T* scratch) const {
    if (cached_ && layout_.caches(p_.output)) return layout_.target(p_.output, outer, chunk, nullptr);
    return layout_.scratch(cached_ ? scratch : nullptr, chunk);
  }

  // The mean of one term over each group, into kNoiseScale: pass(partial, u, cache, rows, lanes, column, sum) adds a
  // strip's sum to `sum`.
  template <class F>
  void mean_round(int64_t outer, bool split, double* totals, T* scratch, F pass) const {
    layout_.template reduce_chunks<1>(split, totals, [&](int64_t chunk, T* sums) {
      Buffer<T> buffer(cached_ ? 0 : layout_.buffer_size());
      const auto u =
          cached_ ? Strip<const T>{nullptr, 0} : layout_.source(normalized(p_), outer, chunk, buffer.data());
      const auto cache = cache_strip(outer, chunk, scratch);
      layout_.for_tile_strips(chunk, [&](auto partial, int64_t row, int64_t rows, int64_t c, int lanes) {
        const V sum = load_dense<V>(sums + c);
        store_dense<V>(sums + c, pass(partial, at(u, row, c), at(cache, row, c), rows, lanes, c, sum));
      });
    });
    for (int64_t i = 0; i < g_.inner; ++i) {
      const double total = layout_.group_total(totals, 0, i);
      if (left_to_caller<1>(p_, outer * g_.inner + i, {{total}})) continue;
      GroupStats<T>(p_, outer * g_.inner + i).set(kNoiseScale, total / double(g_.group_size()));
    }
  }

  // kNoiseScale holds the mean of x from this round to the next.
  void mean_x_round(int64_t outer, bool split, const T* table, double* totals, T* scratch) const {
    mean_round(outer, split, totals, scratch,
               [&](auto partial, auto u, auto cache, int64_t rows, int lanes, int64_t c, V sum) {
                 const auto k = layout_.transform(table, c);
                 return cached_ ? sum_x_pass<partial.value, From::kLog, V>(u, cache, rows, lanes, k, sum)
                                : sum_x_pass<partial.value, From::kInput, V>(u, cache, rows, lanes, k, sum);
               });
  }

  void deviation_round(int64_t outer, bool split, T* table, double* totals, T* scratch) const {
    for (int64_t i = 0; i < g_.inner; ++i)
      layout_.spread(table, kColCentre, i, GroupStats<T>(p_, outer * g_.inner + i).get(kNoiseScale));
    mean_round(outer, split, totals, scratch,
               [&](auto partial, auto u, auto cache, int64_t rows, int lanes, int64_t c, V sum) {
                 const auto k = layout_.transform(table, c);
                 const V centre = layout_.vector(table, kColCentre, c);
                 return cached_ ? deviation_pass<partial.value, From::kX, V>(u, cache, rows, lanes, k, centre, sum)
                                : deviation_pass<partial.value, From::kInput, V>(u, cache, rows, lanes, k, centre, sum);
               });
  }

  void output_round(int64_t outer, bool split, T* table, T* scratch) const {
    const From from = !cached_ ? From::kInput : p_.finds_scale() ? From::kX : From::kLog;
    for (int64_t i = 0; i < g_.inner; ++i) {
      const double s = double(GroupStats<T>(p_, outer * g_.inner + i).get(kNoiseScale));
      layout_.spread(table, kColNoise, i, p_.noise.on ? T(p_.noise.train * s) : T(0));
    }
    for (int64_t c = 0; c < layout_.columns(); ++c) {
      layout_.column(table, kColWeight)[c] = p_.weight ? static_cast<const T*>(p_.weight)[c] : T(1);
      layout_.column(table, kColBias)[c] = p_.bias ? static_cast<const T*>(p_.bias)[c] : T(0);
    }
    for_range(p_.pool, split, layout_.chunks(), [&](int64_t begin, int64_t end) {
      Buffer<T> normal_buffer(p_.noise.on ? layout_.normal_size() : 0);
      Buffer<T> in_buffer(layout_.buffer_size()), out_buffer(layout_.buffer_size());
      Buffer<T> residual_buffer(p_.residual.data ? layout_.buffer_size() : 0);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const auto u = from == From::kInput ? layout_.source(normalized(p_), outer, chunk, in_buffer.data())
                                            : Strip<const T>{nullptr, 0};
        const auto cache = cache_strip(outer, chunk, scratch);
        const auto out = layout_.target(p_.output, outer, chunk, out_buffer.data());
        const auto residual = layout_.residual(outer, chunk, residual_buffer.data());
        layout_.for_tiles(outer, chunk, p_.noise.on, normal_buffer.data(),
                        [&](int64_t row, int64_t rows, const T* z) {
                          const auto tile_out = at(out, row, 0);
                          output_tile(from, at(u, row, 0), at(cache, row, 0), tile_out, rows, z, table);
                          layout_.apply_epilogue(tile_out, at(residual, row, 0), rows);
                        });
        layout_.store(p_.output, outer, chunk, out_buffer.data());
      }
    });
  }

  void output_tile(From from, Strip<const T> u, Strip<T> cache, Strip<T> out, int64_t rows, const T* z,
                   const T* table) const {
    switch (from) {
      case From::kInput:
        return output_tile<From::kInput>(u, cache, out, rows, z, table);
      case From::kLog:
        return output_tile<From::kLog>(u, cache, out, rows, z, table);
      case From::kX:
        return output_tile<From::kX>(u, cache, out, rows, z, table);
    }
  }

  template <From kFrom>
  void output_tile(Strip<const T> u, Strip<T> cache, Strip<T> out, int64_t rows, const T* z, const T* table) const {
    layout_.for_strips([&](auto partial, int64_t c, int lanes) {
      const auto k = layout_.transform(table, c);
      const auto from = at(u, 0, c);
      const auto kept = at(cache, 0, c), to = at(out, 0, c);
      const OutputParams<V> a{layout_.vector(table, kColWeight, c), layout_.vector(table, kColBias, c),
                              layout_.vector(table, kColNoise, c),  {nullptr, 0},
                              {nullptr, 0},                         {z + c, layout_.columns()}};
      z ? output_pass<partial.value, kFrom, true, false, V>(from, kept, to, rows, lanes, k, a)
        : output_pass<partial.value, kFrom, false, false, V>(from, kept, to, rows, lanes, k, a);
    });
  }

  ColumnLayout<T> layout_;
  const cpu::Problem& p_;
  const Geometry& g_;
  const bool cached_;  // whether the rounds after kLambda read the cache
};

}  // namespace
}  // namespace normnorm
