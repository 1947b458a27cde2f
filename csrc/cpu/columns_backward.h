// The backward pass in the columns layout.
#pragma once

#include "columns.h"

namespace normnorm {
namespace {

template <class T>
class ColumnBackward {
 public:
  using V = VectorOf<T>;

  explicit ColumnBackward(const cpu::Problem& p)
      : layout_(p, kTile),  // a strip loads and stores eight sums per tile
        p_(p),
        g_(p.geometry),
        cached_(p.output.data && (layout_.caches(p.output) || layout_.scratched(kScratchMatrix / 4))),
        w_cached_(p.output.data && layout_.scratched(kSmallMatrix)),
        slots_(2 * g_.outer * layout_.columns()) {}

  void run() {
    const bool split = layout_.split_matrix();
    for_range(p_.pool, !split, g_.outer, [&](int64_t begin, int64_t end) {
      Buffer<T> table(kColumnRows * layout_.padded());
      Buffer<double> totals(kSums * layout_.padded());
      Buffer<T> scratch(((cached_ && !layout_.caches(p_.output)) + w_cached_) * layout_.size());
      table.zero(kColumnRows * layout_.padded());
      for (int64_t o = begin; o < end; ++o) backward(o, split, table.data(), totals.data(), scratch.data());
    });
    add_slots();
  }

 private:
  static constexpr int kSums = 8;  // the rows of GradientSums

  void backward(int64_t outer, bool split, T* table, double* totals, T* scratch) {
    layout_.spread_transform(table, outer);
    for (int64_t i = 0; i < g_.inner; ++i) {
      const GroupStats<T> stats(p_, outer * g_.inner + i);
      const auto w = stats.gradient(p_);
      layout_.spread(table, kColCe, i, w.c_e);
      layout_.spread(table, kColCr, i, w.c_r);
      layout_.spread(table, kColCo, i, w.c_o);
      layout_.spread(table, kColTwoD, i, w.two_d);
      layout_.spread(table, kColNoise, i, p_.noise.on ? T(p_.noise.train * double(stats.get(kNoiseScale))) : T(0));
    }
    if (p_.runs(Round::kSums)) sums_round(outer, split, table, totals, scratch);
    if (p_.runs(Round::kGradient)) gradient_round(outer, split, table, totals, scratch);
  }

  void sums_round(int64_t outer, bool split, const T* table, double* totals, T* scratch) {
    bool series = false;
    for (int64_t i = 0; i < g_.inner; ++i)
      series = series || needs_series(p_, GroupStats<T>(p_, outer * g_.inner + i).transform(p_).exponents);
    layout_.template reduce_chunks<kSums>(split, totals, [&](int64_t chunk, T* sums) {
      series ? sums_chunk<true>(outer, chunk, table, sums, scratch)
             : sums_chunk<false>(outer, chunk, table, sums, scratch);
    });
    keep_slots(outer, table, totals);
    if (p_.round == Round::kAll) return;
    for (int64_t c = 0; c < layout_.columns(); ++c) {
      const Sums<5> sums = group_sums(totals, c);
      const double *v = sums.value, *slot = slots_.data() + 2 * c;
      left_to_caller<7>(p_, c, {{v[0], v[1], v[2], v[3], v[4], slot[0], slot[1]}});
    }
  }

  // The first five of GradientSums over a group.
  Sums<5> group_sums(const double* totals, int64_t group) const {
    const T* weight = static_cast<const T*>(p_.weight);
    return {{layout_.group_total(totals, 0, group, weight), layout_.group_total(totals, 1, group, weight),
             layout_.group_total(totals, 2, group, weight), layout_.group_total(totals, 3, group),
             layout_.group_total(totals, 4, group)}};
  }

  void gradient_round(int64_t outer, bool split, T* table, const double* totals, T* scratch) const {
    set_input_constants(outer, table, totals);
    for_range(p_.pool, split, layout_.chunks(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) input_chunk(outer, chunk, table, scratch);
    });
  }

  NN_HD GradientConstants<V> constants(const T* t, int64_t c) const {
    return {layout_.transform(t, c),
            {layout_.vector(t, kColCe, c), layout_.vector(t, kColCr, c), layout_.vector(t, kColCo, c),
             layout_.vector(t, kColTwoD, c)}};
  }

  // A chunk's cache of G psi_h, in the gradient to be written or, for half types, in scratch memory; and that of w.
  Strip<T> cache_strip(int64_t outer, int64_t chunk, T* scratch) const {
    if (layout_.caches(p_.output)) return layout_.target(p_.output, outer, chunk, nullptr);
    return layout_.scratch(cached_ ? scratch + w_cached_ * layout_.size() : nullptr, chunk);
  }
  Strip<T> w_strip(int64_t chunk, T* scratch) const { return layout_.scratch(w_cached_ ? scratch : nullptr, chunk); }

  template <bool kSeries>
  void sums_chunk(int64_t outer, int64_t chunk, const T* table, T* sums, T* scratch) const {
    Buffer<T> normal_buffer(p_.noise.on ? layout_.normal_size() : 0);
    Buffer<T> u_buffer(layout_.buffer_size()), g_buffer(layout_.gradient_size());
    const auto u = layout_.source(p_.input, outer, chunk, u_buffer.data());
    const auto g = layout_.gradient(outer, chunk, g_buffer.data());
    const auto cache = cache_strip(outer, chunk, scratch), w = w_strip(chunk, scratch);
    layout_.for_tiles(outer, chunk, p_.noise.on, normal_buffer.data(), [&](int64_t row, int64_t rows, const T* z) {
      layout_.for_strips([&](auto partial, int64_t c, int lanes) {
        const GradientStrips<V> strips{
            at(u, row, c), at(g, row, c), at(cache, row, c), at(w, row, c), {z + c, layout_.columns()}};
        GradientSums<V> s;
        V* each[kSums] = {&s.psi_h, &s.psi_h_h, &s.lmbda, &s.w, &s.w_h, &s.bias, &s.weight, &s.noise};
        for (int k = 0; k < kSums; ++k) *each[k] = load_dense<V>(sums + k * layout_.padded() + c);
        const auto k = constants(table, c);
        const auto none = no_element_gradients<V>();
        z ? gradient_sums_pass<partial.value, kSeries, true, false, V>(strips, rows, lanes, k, none, s)
          : gradient_sums_pass<partial.value, kSeries, false, false, V>(strips, rows, lanes, k, none, s);
        for (int k = 0; k < kSums; ++k) store_dense<V>(sums + k * layout_.padded() + c, *each[k]);
      });
    });
  }

  void keep_slots(int64_t outer, const T* table, const double* totals) {
    const T* noise = table + kColNoise * layout_.padded();
    for (int64_t c = 0; c < layout_.columns(); ++c) {
      double* slot = slots_.data() + 2 * (outer * layout_.columns() + c);
      slot[0] = totals[5 * layout_.padded() + c];
      slot[1] = totals[6 * layout_.padded() + c] + double(noise[c]) * totals[7 * layout_.padded() + c];
    }
  }

  void set_input_constants(int64_t outer, T* table, const double* totals) const {
    const T* weight = static_cast<const T*>(p_.weight);
    for (int64_t i = 0; i < g_.inner; ++i) {
      const int64_t group = outer * g_.inner + i;
      const double rstd = double(GroupStats<T>(p_, group).get(kRstd));
      const auto k = p_.round == Round::kAll ? input_gradient_constants<T>(group_sums(totals, i),
                                                                           double(g_.group_size()), rstd, p_.frozen)
                                             : given_input_gradient<T>(p_, group, rstd);
      layout_.spread(table, kColDirect, i, k.direct);
      layout_.spread(table, kColLmbda, i, k.lmbda);
      layout_.spread(table, kColOffset, i, k.offset);
      layout_.spread(table, kColSlope, i, k.slope);
    }
    if (!weight) return;
    for (int64_t c = 0; c < layout_.columns(); ++c) layout_.column(table, kColDirect)[c] *= weight[c];
  }

  void input_chunk(int64_t outer, int64_t chunk, const T* table, T* scratch) const {
    const auto cache = cache_strip(outer, chunk, scratch), w = w_strip(chunk, scratch);
    Buffer<T> u_buffer(layout_.buffer_size()), g_buffer(cache.data ? 0 : layout_.gradient_size());
    Buffer<T> out_buffer(layout_.buffer_size());
    const auto u = layout_.source(p_.input, outer, chunk, u_buffer.data());
    const auto g = cache.data ? Strip<const T>{nullptr, 0} : layout_.gradient(outer, chunk, g_buffer.data());
    const auto out = layout_.target(p_.output, outer, chunk, out_buffer.data());
    layout_.for_tile_strips(chunk, [&](auto partial, int64_t row, int64_t rows, int64_t c, int lanes) {
      const GradientStrips<V> strips{at(u, row, c), at(g, row, c), at(cache, row, c), at(w, row, c), {nullptr, 0}};
      const InputGradient<V> k{layout_.vector(table, kColDirect, c), layout_.vector(table, kColLmbda, c),
                               layout_.vector(table, kColOffset, c), layout_.vector(table, kColSlope, c)};
      const auto pass = [&](auto cached) {
        input_gradient_pass<partial.value, cached.value, false, V>(strips, at(out, row, c), rows, lanes,
                                                                   constants(table, c), no_element_gradients<V>(), k);
      };
      if (w_cached_)
        pass(std::integral_constant<Cached, Cached::kBoth>());
      else if (cached_)
        pass(std::integral_constant<Cached, Cached::kThroughH>());
      else
        pass(std::integral_constant<Cached, Cached::kNothing>());
    });
    layout_.add_sum_gradient(outer, chunk, out);
    layout_.store(p_.output, outer, chunk, out_buffer.data());
  }

  void add_slots() {
    T* bias = static_cast<T*>(p_.grad_bias);
    T* weight = static_cast<T*>(p_.grad_weight);
    if (!bias && !weight) return;
    for (int64_t c = 0; c < layout_.columns(); ++c) {
      double b = 0, w = 0;
      for (int64_t o = 0; o < g_.outer; ++o) {
        const double* slot = slots_.data() + 2 * (o * layout_.columns() + c);
        b += slot[0], w += slot[1];
      }
      if (bias) bias[c] = T(b);
      if (weight) weight[c] = T(w);
    }
  }

  ColumnLayout<T> layout_;
  const cpu::Problem& p_;
  const Geometry& g_;
  const bool cached_, w_cached_;  // whether G psi_h and w are cached
  Buffer<double> slots_;  // (matrix, column) x {bias, weight}
};

}  // namespace
}  // namespace normnorm
