// The forward pass in the rows layout.
#pragma once

#include "rows.h"

namespace normnorm {
namespace {

template <class T>
class RowForward {
 public:
  using V = VectorOf<T>;

  explicit RowForward(const cpu::Problem& p)
      : layout_(p), p_(p), cached_(!p.frozen && layout_.caches(p.output)) {}

  void run() {
    if (p_.frozen && p_.round == Round::kAll && !p_.noise.on && layout_.evaluates_runs()) return evaluate_runs();
    const int64_t groups = p_.geometry.groups(), bundle = layout_.bundle();
    const bool split = layout_.split_groups();
    for_range(p_.pool, !split, groups, [&](int64_t begin, int64_t end) {
      Buffer<T> scratch(layout_.scratched() ? bundle * layout_.group_size() : 0);
      for (int64_t g = begin; g < end; g += bundle)
        forward(g, smaller(bundle, end - g), split, scratch.data());
    });
  }

 private:
  // Evaluation of runs in place and in the order of memory: a group's runs lie far apart, and the processor prefetches
  // what is adjacent.
  void evaluate_runs() {
    const Geometry& g = p_.geometry;
    Buffer<TransformConstants<T>> constants(g.groups());
    for_range(p_.pool, true, g.groups(), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) constants[i] = GroupStats<T>(p_, i).transform(p_);
    });
    for_range(p_.pool, true, g.groups() * g.runs, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t inner = i % g.inner, run = i / g.inner % g.runs, outer = i / (g.inner * g.runs);
        const GroupIndex at = {outer, inner, outer * g.inner + inner};
        output_from<From::kInput>(at, {run, 1, 0, g.length}, broadcast<V>(constants[at.group]), T(0), nullptr);
      }
    });
  }

  struct Group {
    GroupIndex at;
    GroupStats<T> stats;
    T* scratch;
    double variance;
  };

  TransformConstants<V> constants(const Group& g) const { return broadcast<V>(g.stats.transform(p_)); }

  void forward(int64_t first, int64_t count, bool split, T* scratch) {
    Group groups[kMaxBundle];
    for (int64_t k = 0; k < count; ++k)
      groups[k] = {layout_.index(first + k), GroupStats<T>(p_, first + k),
                   layout_.scratched() ? scratch + k * layout_.group_size() : scratch, 0};
    const auto for_groups = [&](Round round, auto body) {
      for (int64_t k = 0; p_.runs(round) && k < count; ++k) (this->*body)(groups[k], split);
    };
    for_groups(Round::kMoments, &RowForward::moments_round);
    for_groups(Round::kLambda, &RowForward::lambda_round);
    for_groups(Round::kMeanX, &RowForward::mean_x_round);
    for_groups(Round::kDeviation, &RowForward::deviation_round);
    for_groups(Round::kOutput, &RowForward::output_round);
  }

  template <class Part, class F>
  Part fold(bool split, F part) const {
    return reduce_parts<Part>(p_.pool, split, layout_.plan().blocks(), part);
  }

  void moments_round(Group& g, bool split) const {
    const auto part = fold<MomentsPart>(split, [&](int64_t b) { return moments_block(g.at, b); });
    if (left_to_caller<3>(p_, g.at.group, {{part.moments.mean, part.moments.low, part.moments.m2}})) return;
    g.stats.set_moments(part.moments, p_.settings.eps);
    g.stats.set(kLmbda, 1);
    g.variance = part.moments.m2 / part.moments.count;
  }

  void lambda_round(Group& g, bool split) const {
    const auto c = constants(g);
    const auto sums =
        fold<Sums<4>>(split, [&](int64_t b) { return lambda_block(g.at, b, c.standardize, g.scratch); });
    if (left_to_caller(p_, g.at.group, sums)) return;
    g.stats.set_lambda(sums, double(layout_.group_size()), g.variance, p_);
  }

  // kNoiseScale holds the mean of x from this round to the next.
  void mean_x_round(Group& g, bool split) const {
    const auto c = constants(g);
    const auto x = fold<Sums<1>>(split, [&](int64_t b) { return sum_x_block(g.at, b, c, g.scratch); });
    if (left_to_caller(p_, g.at.group, x)) return;
    g.stats.set(kNoiseScale, x.value[0] / double(layout_.group_size()));
  }

  void deviation_round(Group& g, bool split) const {
    const auto c = constants(g);
    const V centre = splat<V>(g.stats.get(kNoiseScale));
    const auto deviation =
        fold<Sums<1>>(split, [&](int64_t b) { return deviation_block(g.at, b, c, centre, g.scratch); });
    if (left_to_caller(p_, g.at.group, deviation)) return;
    g.stats.set(kNoiseScale, deviation.value[0] / double(layout_.group_size()));
  }

  void output_round(Group& g, bool split) const {
    const auto c = constants(g);
    const T noise = p_.noise.on ? T(p_.noise.train * double(g.stats.get(kNoiseScale))) : T(0);
    const From from = !cached_ ? From::kInput : p_.finds_scale() ? From::kX : From::kLog;
    for_range(p_.pool, split, layout_.plan().blocks(), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) output_block(g.at, b, c, from, noise, g.scratch);
    });
  }

  MomentsPart moments_block(const GroupIndex& at, int64_t index) const {
    const Block b = layout_.plan()[index];
    T buffer[kBlock];
    if (p_.addend.data) layout_.add_addend(at, b);
    const T* u = layout_.fetch(normalized(p_), at, b, buffer);
    const V pilot = splat<V>(u[0]);
    double sum = 0;
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      sum += sum_lanes(sum_pass<partial.value, V>({u + i, kLanes<V>}, steps, lanes, pilot));
    });
    const T centre = T(double(pilot[0]) + sum / double(b.size));
    double offset = 0, squares = 0;
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      const auto s = centred_pass<partial.value, V>({u + i, kLanes<V>}, steps, lanes, splat<V>(centre));
      offset += sum_lanes(s.sum);
      squares += sum_lanes(s.squares);
    });
    return {recentred_moments(double(b.size), double(centre), offset, squares)};
  }

  Sums<4> lambda_block(const GroupIndex& at, int64_t index, const Standardizer<V>& h, T* scratch) const {
    const Block b = layout_.plan()[index];
    T buffer[kBlock];
    const T* u = layout_.fetch(normalized(p_), at, b, buffer);
    T* cache = layout_.cache(p_.output, at, b, scratch);
    LambdaSums<V> sums;
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      if (cache)
        lambda_pass<partial.value, true, V>({u + i, kLanes<V>}, {cache + i, kLanes<V>}, steps, lanes, h,
                                            sums);
      else
        lambda_pass<partial.value, false, V>({u + i, kLanes<V>}, {nullptr, 0}, steps, lanes, h, sums);
    });
    const LambdaTerms<V> total = sums.totals(1);
    return {{sum_lanes(total.hd), sum_lanes(total.log), sum_lanes(total.d), sum_lanes(total.e)}};
  }

  Sums<1> sum_x_block(const GroupIndex& at, int64_t index, const TransformConstants<V>& c, T* scratch) const {
    const Block b = layout_.plan()[index];
    T buffer[kBlock];
    V sum = splat<V>(0);
    if (cached_) {
      T* cache = layout_.cache(p_.output, at, b, scratch);
      for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
        sum = sum_x_pass<partial.value, From::kLog, V>({nullptr, 0}, {cache + i, kLanes<V>}, steps, lanes, c,
                                                       sum);
      });
    } else {
      const T* u = layout_.fetch(normalized(p_), at, b, buffer);
      for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
        sum = sum_x_pass<partial.value, From::kInput, V>({u + i, kLanes<V>}, {nullptr, 0}, steps, lanes, c,
                                                         sum);
      });
    }
    return {{sum_lanes(sum)}};
  }

  Sums<1> deviation_block(const GroupIndex& at, int64_t index, const TransformConstants<V>& c, V centre,
                          T* scratch) const {
    const Block b = layout_.plan()[index];
    T buffer[kBlock];
    V sum = splat<V>(0);
    if (cached_) {
      T* cache = layout_.cache(p_.output, at, b, scratch);
      for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
        sum = deviation_pass<partial.value, From::kX, V>({nullptr, 0}, {cache + i, kLanes<V>}, steps, lanes,
                                                         c, centre, sum);
      });
    } else {
      const T* u = layout_.fetch(normalized(p_), at, b, buffer);
      for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
        sum = deviation_pass<partial.value, From::kInput, V>({u + i, kLanes<V>}, {nullptr, 0}, steps, lanes,
                                                             c, centre, sum);
      });
    }
    return {{sum_lanes(sum)}};
  }

  void output_block(const GroupIndex& at, int64_t index, const TransformConstants<V>& c, From from, T noise,
                    T* scratch) const {
    const Block b = layout_.plan()[index];
    switch (from) {
      case From::kInput:
        return output_from<From::kInput>(at, b, c, noise, scratch);
      case From::kLog:
        return output_from<From::kLog>(at, b, c, noise, scratch);
      case From::kX:
        return output_from<From::kX>(at, b, c, noise, scratch);
    }
  }

  template <From kFrom>
  void output_from(const GroupIndex& at, const Block& b, const TransformConstants<V>& c, T noise, T* scratch) const {
    T in_buffer[kBlock], out_buffer[kBlock];
    T normal_buffer[kBlock + kNoiseSlack];
    const T* u = kFrom == From::kInput ? layout_.fetch(normalized(p_), at, b, in_buffer) : nullptr;
    T* cache = kFrom == From::kInput ? nullptr : layout_.cache(p_.output, at, b, scratch);
    T* out = layout_.destination(p_.output, at, b, out_buffer);
    const bool noisy = p_.noise.on;
    const T* z = noisy ? layout_.block_normals(at, b, normal_buffer) : nullptr;
    const bool per_element = p_.affine == Affine::kPerElement && p_.weight;
    const T* weights = per_element ? static_cast<const T*>(p_.weight) + b.offset : nullptr;
    const T* biases = per_element ? static_cast<const T*>(p_.bias) + b.offset : nullptr;
    const V weight = splat<V>(layout_.parameter(p_.weight, at, b, T(1)));
    const V bias = splat<V>(layout_.parameter(p_.bias, at, b, T(0)));
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      constexpr int64_t w = kLanes<V>;
      const OutputParams<V> a{weight, bias, splat<V>(noise), {weights + i, w}, {biases + i, w}, {z + i, w}};
      const auto pass = [&](auto with_noise, auto elementwise) {
        output_pass<partial.value, kFrom, with_noise.value, elementwise.value, V>(
            {u + i, w}, {cache + i, w}, {out + i, w}, steps, lanes, c, a);
      };
      if (noisy && per_element)
        pass(std::true_type(), std::true_type());
      else if (noisy)
        pass(std::true_type(), std::false_type());
      else if (per_element)
        pass(std::false_type(), std::true_type());
      else
        pass(std::false_type(), std::false_type());
    });
    layout_.apply_epilogue(at, b, out);
    layout_.store(p_.output, at, b, out_buffer);
  }

  RowLayout<T> layout_;
  const cpu::Problem& p_;
  const bool cached_;  // whether the rounds after kLambda read the cache
};

}  // namespace
}  // namespace normnorm
