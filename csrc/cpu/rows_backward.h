// The backward pass in the rows layout: a reduction over each group, an elementwise pass for the input's gradient, and
// the parameters' gradients.
//
// A weight that is constant over a block is factored out of the block's sums. Its gradient is kept in double, one slot
// per (group, run), and summed over the outer axis at the end. The gradients of weights that vary by element (layer
// norm) are summed over a chunk of groups into one row per chunk; the rows are summed at the end.
#pragma once

#include "rows.h"

namespace normnorm {
namespace {

template <class T>
class RowBackward {
 public:
  using V = VectorOf<T>;

  explicit RowBackward(const cpu::Problem& p)
      : layout_(p),
        p_(p),
        elementwise_(p.affine == Affine::kPerElement && p.weight),
        slots_per_group_(p.affine == Affine::kPerRun ? p.geometry.runs : 1),
        groups_per_chunk_(elementwise_
                              ? clamped(ceil_div(p.geometry.groups(), kChunks), kGroupsAtLeast, kGroupsAtMost)
                              : 1),
        chunks_(ceil_div(p.geometry.groups(), groups_per_chunk_)),
        slots_(elementwise_ ? 0 : 2 * p.geometry.groups() * slots_per_group_),
        rows_(elementwise_ ? 2 * chunks_ * p.geometry.length : 0) {}

  void run() {
    const bool split = layout_.split_groups();
    slots_.zero(elementwise_ ? 0 : 2 * p_.geometry.groups() * slots_per_group_);
    rows_.zero(elementwise_ ? 2 * chunks_ * p_.geometry.length : 0);
    const int64_t bundle = layout_.bundle();
    for_range(p_.pool, !split, chunks_, [&](int64_t begin, int64_t end) {
      Buffer<T> scratch(scratch_per_group() * bundle);
      const int64_t last = smaller(end * groups_per_chunk_, p_.geometry.groups());
      for (int64_t g = begin * groups_per_chunk_; g < last; g += bundle)
        backward(g, smaller(bundle, last - g), split, scratch.data());
    });
    if (elementwise_)
      add_rows();
    else
      add_slots();
  }

 private:
  // Chunks of groups: enough for the threads, long enough that the rows of partial sums are small beside the data,
  // short enough to sum in float32.
  static constexpr int64_t kChunks = 64, kGroupsAtLeast = 4, kGroupsAtMost = 2048;

  // Small groups cache w beside G psi_h.
  bool keeps_w() const { return p_.output.data && layout_.scratched() && layout_.group_size() <= kSmallGroup; }
  int64_t scratch_per_group() const {
    return p_.output.data && layout_.scratched() ? layout_.group_size() * (keeps_w() ? 2 : 1) : 0;
  }

  // What the elementwise pass needs from the reduction over one group.
  struct Group {
    GroupIndex at;
    T* scratch;
    TransformConstants<T> transform;
    LambdaGradient<T> lmbda;
    InputGradient<T> input;
    GradientConstants<V> constants() const { return {broadcast<V>(transform), broadcast<V>(lmbda)}; }
  };

  void backward(int64_t first, int64_t count, bool split, T* scratch) {
    Group groups[kMaxBundle];
    for (int64_t i = 0; i < count; ++i) {
      const GroupStats<T> stats(p_, first + i);
      groups[i] = {layout_.index(first + i),
                   scratch + i * scratch_per_group(),
                   stats.transform(p_),
                   stats.gradient(p_),
                   {}};
      if (p_.runs(Round::kSums))
        sums_round(groups[i], stats, split);
      else
        groups[i].input = given_input_gradient<T>(p_, first + i, double(stats.get(kRstd)));
    }
    if (!p_.runs(Round::kGradient)) return;
    for (int64_t i = 0; i < count; ++i) {
      const auto c = groups[i].constants();
      for_range(p_.pool, split, layout_.plan().blocks(), [&](int64_t begin, int64_t end) {
        for (int64_t b = begin; b < end; ++b) input_block(groups[i], b, c);
      });
    }
  }

  void sums_round(Group& g, const GroupStats<T>& stats, bool split) {
    const auto c = g.constants();
    const bool series = needs_series(p_, g.transform.exponents);
    const T noise = p_.noise.on ? T(p_.noise.train * double(stats.get(kNoiseScale))) : T(0);
    const int64_t blocks = layout_.plan().blocks();
    const auto sums_of = [&](int64_t b) {
      return series ? sums_block<true>(g, b, c, noise) : sums_block<false>(g, b, c, noise);
    };
    Sums<7> sums;
    if (p_.affine == Affine::kPerRun) {
      Buffer<double> run_sums(2 * blocks);
      sums = reduce_parts<Sums<7>>(p_.pool, split, blocks, [&](int64_t b) {
        const auto part = sums_of(b);
        run_sums[2 * b] = part.value[5], run_sums[2 * b + 1] = part.value[6];
        return part;
      });
      for (int64_t b = 0; b < blocks; ++b) {
        double* slot = slots_.data() + 2 * (g.at.group * slots_per_group_ + layout_.plan()[b].run);
        slot[0] += run_sums[2 * b], slot[1] += run_sums[2 * b + 1];
      }
    } else {
      sums = reduce_parts<Sums<7>>(p_.pool, split, blocks, sums_of);
      if (!elementwise_) slots_[2 * g.at.group] = sums.value[5], slots_[2 * g.at.group + 1] = sums.value[6];
    }
    if (left_to_caller(p_, g.at.group, sums)) return;
    const double* v = sums.value;
    g.input = input_gradient_constants<T>({{v[0], v[1], v[2], v[3], v[4]}}, double(layout_.group_size()),
                                          double(stats.get(kRstd)), p_.frozen);
  }

  ElementGradients<V> element_gradients(const GroupIndex& at, const Block& b, int64_t i, T noise) {
    constexpr int64_t w = kLanes<V>;
    if (!elementwise_) return no_element_gradients<V>();
    T* row = rows_.data() + 2 * (at.group / groups_per_chunk_) * p_.geometry.length + b.offset + i;
    return {{static_cast<const T*>(p_.weight) + b.offset + i, w},
            {row, w},
            {row + p_.geometry.length, w},
            splat<V>(noise)};
  }

  // The sums psi_h, psi_h h, psi_lambda, w, w h (the first three times the weight), the gradients of bias and weight.
  template <bool kSeries>
  Sums<7> sums_block(const Group& group, int64_t index, const GradientConstants<V>& c, T noise) {
    const GroupIndex& at = group.at;
    const Block b = layout_.plan()[index];
    T u_buffer[kBlock], g_buffer[kBlock];
    T normal_buffer[kBlock + kNoiseSlack];
    constexpr int64_t w = kLanes<V>;
    const T* u = layout_.fetch(p_.input, at, b, u_buffer);
    const T* g = layout_.fetch_gradient(at, b, g_buffer);
    T* cache = p_.output.data ? layout_.cache(p_.output, at, b, group.scratch) : nullptr;
    T* w_cache = keeps_w() ? cache + layout_.group_size() : nullptr;
    const bool noisy = noise != T(0);
    const T* z = noisy ? layout_.block_normals(at, b, normal_buffer) : nullptr;
    GradientSums<V> s = zero_sums<V>();
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      const GradientStrips<V> strips{{u + i, w},
                                     {g + i, w},
                                     {cache ? cache + i : nullptr, w},
                                     {w_cache ? w_cache + i : nullptr, w},
                                     {z + i, w}};
      const auto e = element_gradients(at, b, i, noise);
      const auto pass = [&](auto with_noise, auto elementwise) {
        gradient_sums_pass<partial.value, kSeries, with_noise.value, elementwise.value, V>(strips, steps, lanes, c, e,
                                                                                           s);
      };
      if (noisy && elementwise_)
        pass(std::true_type(), std::true_type());
      else if (noisy)
        pass(std::true_type(), std::false_type());
      else if (elementwise_)
        pass(std::false_type(), std::true_type());
      else
        pass(std::false_type(), std::false_type());
    });
    const double weight = double(layout_.parameter(p_.weight, at, b, T(1)));
    return {{weight * sum_lanes(s.psi_h), weight * sum_lanes(s.psi_h_h), weight * sum_lanes(s.lmbda),
             sum_lanes(s.w), sum_lanes(s.w_h), sum_lanes(s.bias),
             sum_lanes(s.weight) + double(noise) * sum_lanes(s.noise)}};
  }

  void input_block(const Group& group, int64_t index, const GradientConstants<V>& c) {
    const GroupIndex& at = group.at;
    const InputGradient<T>& k = group.input;
    const Block b = layout_.plan()[index];
    T u_buffer[kBlock], g_buffer[kBlock], out_buffer[kBlock];
    constexpr int64_t w = kLanes<V>;
    const T* u = layout_.fetch(p_.input, at, b, u_buffer);
    T* cache = layout_.cache(p_.output, at, b, group.scratch);
    const T* g = cache ? nullptr : layout_.fetch_gradient(at, b, g_buffer);
    T* out = layout_.destination(p_.output, at, b, out_buffer);
    const InputGradient<V> kv{splat<V>(k.direct * layout_.parameter(p_.weight, at, b, T(1))), splat<V>(k.lmbda),
                              splat<V>(k.offset), splat<V>(k.slope)};
    for_vectors<V>(b.size, [&](auto partial, int64_t i, int64_t steps, int lanes) {
      const GradientStrips<V> strips{
          {u + i, w}, {g + i, w}, {cache + i, w}, {cache + layout_.group_size() + i, w}, {nullptr, 0}};
      const auto e = element_gradients(at, b, i, T(0));
      const Strip<T> to{out + i, w};
      if (keeps_w())
        input_gradient_pass<partial.value, Cached::kBoth, false, V>(strips, to, steps, lanes, c, e, kv);
      else if (cache)
        input_gradient_pass<partial.value, Cached::kThroughH, false, V>(strips, to, steps, lanes, c, e, kv);
      else if (elementwise_)
        input_gradient_pass<partial.value, Cached::kNothing, true, V>(strips, to, steps, lanes, c, e, kv);
      else
        input_gradient_pass<partial.value, Cached::kNothing, false, V>(strips, to, steps, lanes, c, e, kv);
    });
    layout_.add_sum_gradient(at, b, out);
    layout_.store(p_.output, at, b, out_buffer);
  }

  void add_slots() {
    const Geometry& g = p_.geometry;
    const int64_t parameters = g.inner * slots_per_group_;
    T* bias = static_cast<T*>(p_.grad_bias);
    T* weight = static_cast<T*>(p_.grad_weight);
    if (p_.affine == Affine::kPerElement || (!bias && !weight)) return;
    for (int64_t i = 0; i < parameters; ++i) {
      double b = 0, w = 0;
      for (int64_t o = 0; o < g.outer; ++o) {
        const double* slot = slots_.data() + 2 * (o * parameters + i);
        b += slot[0], w += slot[1];
      }
      if (bias) bias[i] = T(b);
      if (weight) weight[i] = T(w);
    }
  }

  void add_rows() {
    const int64_t length = p_.geometry.length;
    T* bias = static_cast<T*>(p_.grad_bias);
    T* weight = static_cast<T*>(p_.grad_weight);
    for_range(p_.pool, length * chunks_ > (1 << 16), ceil_div(length, kBlock),
              [&](int64_t begin, int64_t end) {
                Buffer<double> sums(2 * kBlock);
                for (int64_t part = begin; part < end; ++part) {
                  const int64_t first = part * kBlock, size = smaller(kBlock, length - first);
                  sums.zero(2 * kBlock);
                  for (int64_t chunk = 0; chunk < chunks_; ++chunk) {
                    const T* row = rows_.data() + 2 * chunk * length + first;
                    for (int64_t i = 0; i < size; ++i) sums[i] += double(row[i]);
                    for (int64_t i = 0; i < size; ++i) sums[kBlock + i] += double(row[length + i]);
                  }
                  for (int64_t i = 0; i < size; ++i) {
                    if (weight) weight[first + i] = T(sums[i]);
                    if (bias) bias[first + i] = T(sums[kBlock + i]);
                  }
                }
              });
  }

  RowLayout<T> layout_;
  const cpu::Problem& p_;
  const bool elementwise_;
  const int64_t slots_per_group_;
  const int64_t groups_per_chunk_, chunks_;
  Buffer<double> slots_;  // (group, run) x {bias, weight}
  Buffer<T> rows_;        // chunk x {weight, bias} x length
};

}  // namespace
}  // namespace normnorm
