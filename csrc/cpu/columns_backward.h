// The backward pass of a columns walk.
#pragma once

#include "columns.h"

namespace normnorm {
namespace {

template <class T>
class ColumnBackward {
 public:
  using V = VectorOf<T>;

  explicit ColumnBackward(const cpu::Problem& p)
      : walk_(p),
        p_(p),
        g_(p.geometry),
        noisy_(p.noise.on && p.grad_weight),
        slots_(2 * g_.outer * walk_.columns()) {}

  void run() {
    const bool split = walk_.split_matrix();
    for_range(p_.pool, !split, g_.outer, [&](int64_t begin, int64_t end) {
      Buffer<T> table(kColumnRows * walk_.padded());
      Buffer<double> totals(kSums * walk_.padded());
      table.zero(kColumnRows * walk_.padded());
      for (int64_t o = begin; o < end; ++o) backward(o, split, table.data(), totals.data());
    });
    add_slots();
  }

 private:
  static constexpr int kSums = 8;  // the rows of GradientSums

  void backward(int64_t outer, bool split, T* table, double* totals) {
    bool small = false;
    walk_.spread_transform(table, outer);
    for (int64_t i = 0; i < g_.inner; ++i) {
      const GroupStats<T> stats(p_, outer * g_.inner + i);
      small = small || p_.frozen || has_small_exponent(stats.transform(p_).exponents);
      const auto w = stats.gradient(p_);
      walk_.spread(table, kColCe, i, w.c_e);
      walk_.spread(table, kColCr, i, w.c_r);
      walk_.spread(table, kColCo, i, w.c_o);
      walk_.spread(table, kColTwoD, i, w.two_d);
      walk_.spread(table, kColNoise, i, noisy_ ? T(p_.noise.train * double(stats.get(kNoiseScale))) : T(0));
    }
    walk_.template fold_chunks<kSums>(split, totals, [&](int64_t chunk, T* sums) {
      if (small)
        sums_chunk<true>(outer, chunk, table, sums);
      else
        sums_chunk<false>(outer, chunk, table, sums);
    });
    keep_slots(outer, table, totals);
    if (!p_.output.data) return;
    set_input_constants(outer, table, totals);
    for_range(p_.pool, split, walk_.chunks(), [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) input_chunk(outer, chunk, table);
    });
  }

  NN_HD GradientConstants<V> constants(const T* t, int64_t c) const {
    return {walk_.transform(t, c),
            {walk_.vector(t, kColCe, c), walk_.vector(t, kColCr, c), walk_.vector(t, kColCo, c),
             walk_.vector(t, kColTwoD, c)}};
  }

  static Strip<const T> at(const Strip<const T>& s, int64_t row, int64_t column) {
    return {s.data + row * s.step + column, s.step};
  }
  static Strip<T> at(const Strip<T>& s, int64_t row, int64_t column) {
    return {s.data ? s.data + row * s.step + column : nullptr, s.step};
  }

  // Where G psi_h is kept: in the gradient to be written, until it is.
  Strip<T> cache_strip(int64_t outer, int64_t chunk) const {
    return walk_.keeps(p_.output) ? walk_.target(p_.output, outer, chunk, nullptr) : Strip<T>{nullptr, 0};
  }

  template <bool kCareful>
  void sums_chunk(int64_t outer, int64_t chunk, const T* table, T* sums) const {
    Buffer<T> normal_buffer(noisy_ ? walk_.normal_size() : 0);
    Buffer<T> u_buffer(walk_.buffer_size()), g_buffer(walk_.gradient_size());
    const auto u = walk_.source(p_.input, outer, chunk, u_buffer.data());
    const auto g = walk_.gradient(outer, chunk, g_buffer.data());
    const auto cache = cache_strip(outer, chunk);
    walk_.for_tiles(outer, chunk, noisy_, normal_buffer.data(), [&](int64_t row, int64_t rows, const T* z) {
      walk_.for_strips([&](auto partial, int64_t c, int lanes) {
        const GradientStrips<V> strips{
            at(u, row, c), at(g, row, c), at(cache, row, c), {nullptr, 0}, {z + c, walk_.columns()}};
        GradientSums<V> s;
        V* each[kSums] = {&s.psi_h, &s.psi_h_h, &s.lmbda, &s.w, &s.w_h, &s.bias, &s.weight, &s.noise};
        for (int k = 0; k < kSums; ++k) *each[k] = load_dense<V>(sums + k * walk_.padded() + c);
        const auto k = constants(table, c);
        const auto none = no_element_gradients<V>();
        if (z)
          gradient_sums_pass<partial.value, kCareful, true, false, V>(strips, rows, lanes, k, none, s);
        else
          gradient_sums_pass<partial.value, kCareful, false, false, V>(strips, rows, lanes, k, none, s);
        for (int k = 0; k < kSums; ++k) store_dense<V>(sums + k * walk_.padded() + c, *each[k]);
      });
    });
  }

  void keep_slots(int64_t outer, const T* table, const double* totals) {
    const T* noise = table + kColNoise * walk_.padded();
    for (int64_t c = 0; c < walk_.columns(); ++c) {
      double* slot = slots_.data() + 2 * (outer * walk_.columns() + c);
      slot[0] = totals[5 * walk_.padded() + c];
      slot[1] = totals[6 * walk_.padded() + c] + double(noise[c]) * totals[7 * walk_.padded() + c];
    }
  }

  void set_input_constants(int64_t outer, T* table, const double* totals) const {
    const T* weight = static_cast<const T*>(p_.weight);
    for (int64_t i = 0; i < g_.inner; ++i) {
      const double rstd = double(GroupStats<T>(p_, outer * g_.inner + i).get(kRstd));
      const auto k = input_gradient_constants<T>(
          walk_.group_total(totals, 0, i, weight), walk_.group_total(totals, 1, i, weight),
          walk_.group_total(totals, 2, i, weight), walk_.group_total(totals, 3, i),
          walk_.group_total(totals, 4, i), double(g_.group_size()), rstd, 1.0, p_.frozen);
      walk_.spread(table, kColDirect, i, k.direct);
      walk_.spread(table, kColLmbda, i, k.lmbda);
      walk_.spread(table, kColOffset, i, k.offset);
      walk_.spread(table, kColSlope, i, k.slope);
    }
    if (!weight) return;
    for (int64_t c = 0; c < walk_.columns(); ++c) walk_.column(table, kColDirect)[c] *= weight[c];
  }

  void input_chunk(int64_t outer, int64_t chunk, const T* table) const {
    const int64_t rows = walk_.chunk_end(chunk) - walk_.chunk_begin(chunk);
    const bool kept = walk_.keeps(p_.output);
    Buffer<T> u_buffer(walk_.buffer_size()), g_buffer(kept ? 0 : walk_.gradient_size());
    Buffer<T> out_buffer(walk_.buffer_size());
    const auto u = walk_.source(p_.input, outer, chunk, u_buffer.data());
    const auto g =
        kept ? Strip<const T>{nullptr, 0} : walk_.gradient(outer, chunk, g_buffer.data());
    const auto out = walk_.target(p_.output, outer, chunk, out_buffer.data());
    walk_.for_strips([&](auto partial, int64_t c, int lanes) {
      const GradientStrips<V> strips{at(u, 0, c),
                                     {g.data + c, g.step},
                                     kept ? at(out, 0, c) : Strip<T>{nullptr, 0},
                                     {nullptr, 0},
                                     {nullptr, 0}};
      const InputGradient<V> k{walk_.vector(table, kColDirect, c), walk_.vector(table, kColLmbda, c),
                               walk_.vector(table, kColOffset, c), walk_.vector(table, kColSlope, c)};
      const auto none = no_element_gradients<V>();
      if (kept)
        input_gradient_pass<partial.value, Kept::kThroughH, false, V>(strips, at(out, 0, c), rows, lanes,
                                                                      constants(table, c), none, k);
      else
        input_gradient_pass<partial.value, Kept::kNothing, false, V>(strips, at(out, 0, c), rows, lanes,
                                                                     constants(table, c), none, k);
    });
    walk_.join_sum_gradient(outer, chunk, out);
    walk_.deliver(p_.output, outer, chunk, out_buffer.data());
  }

  void add_slots() {
    T* bias = static_cast<T*>(p_.grad_bias);
    T* weight = static_cast<T*>(p_.grad_weight);
    for (int64_t c = 0; c < walk_.columns(); ++c) {
      double b = 0, w = 0;
      for (int64_t o = 0; o < g_.outer; ++o) {
        const double* slot = slots_.data() + 2 * (o * walk_.columns() + c);
        b += slot[0], w += slot[1];
      }
      if (bias) bias[c] = T(b);
      if (weight) weight[c] = T(w);
    }
  }

  ColumnWalk<T> walk_;
  const cpu::Problem& p_;
  const Geometry& g_;
  const bool noisy_;
  Buffer<double> slots_;  // (matrix, column) x {bias, weight}
};

}  // namespace
}  // namespace normnorm
