// The inner loops of the forward and backward passes, for both layouts. Each loop is over `steps` vectors whose
// addresses differ by a strip's `step` elements.
//
// In the rows layout a strip is a contiguous part of a group (step = lanes), with the same constants in every lane. In
// the columns layout it is a few neighbouring columns (step = the row's stride), with a group and its constants in each
// lane. kPartial vectors have `lanes` elements: the others are neither read, nor written, nor summed.
#pragma once

#include "../math/lmbda.h"
#include "../math/transform.h"
#include "simd.h"

namespace normnorm {
namespace {

template <bool kPartial, class V>
struct Active {
  int lanes;
  typename Lanes<V>::Int mask;

  NN_HD explicit Active(int count) : lanes(count), mask(first_lanes<V>(count)) {}
  NN_HD V keep(V v) const {
    if constexpr (kPartial)
      return mask ? v : splat<V>(0);
    else
      return v;
  }
};

// h = (u - mean) rstd + shift, where shift = -mean(u - mean) rstd corrects for the rounding of `mean`.
template <class V>
struct Standardizer {
  V mean, rstd, shift;
  NN_HD V operator()(V u) const { return (u - mean) * rstd + shift; }
};

template <class T>
struct Strip {
  T* data;
  int64_t step;
};

// Prefetches into the second-level cache what lies a tile, and at least 2048 elements, after step i; for writing unless T
// is const. The hardware does not predict the stride of columns, and the computation of a vector is too long for the
// processor to overlap a cache miss with other vectors. The first-level cache does not hold so much.
constexpr int kTile = 32;
NN_HD int64_t prefetch_distance(int64_t step) { return kTile * step > 2048 ? kTile * step : 2048; }
template <class T>
NN_HD void prefetch(const Strip<const T>& s, int64_t i) {
  __builtin_prefetch(s.data + i * s.step + prefetch_distance(s.step), 0, 2);
}
template <class T>
NN_HD void prefetch(const Strip<T>& s, int64_t i) {
  __builtin_prefetch(s.data + i * s.step + prefetch_distance(s.step), 1, 2);
}

// Where x is computed from the input, adjacent vectors are prefetched a tile ahead into the first-level cache instead.
template <class T>
NN_HD void prefetch_tile(const Strip<T>& s, int64_t i) {
  s.step == kVectorBytes / int(sizeof(T)) ? __builtin_prefetch(s.data + (i + kTile) * s.step) : prefetch(s, i);
}

// The sum of u - pilot.
template <bool kPartial, class V>
NN_HD V sum_pass(Strip<const ScalarOf<V>> u, int64_t steps, int lanes, V pilot) {
  const Active<kPartial, V> active(lanes);
  V a = splat<V>(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 <= steps; i += 4) {
    const ScalarOf<V>* p = u.data + i * u.step;
    for (int k = 0; k < 4; ++k) prefetch(u, i + k);
    a += active.keep(read<kPartial, V>(p, lanes) - pilot);
    b += active.keep(read<kPartial, V>(p + u.step, lanes) - pilot);
    c += active.keep(read<kPartial, V>(p + 2 * u.step, lanes) - pilot);
    d += active.keep(read<kPartial, V>(p + 3 * u.step, lanes) - pilot);
  }
  for (; i < steps; ++i) a += active.keep(read<kPartial, V>(u.data + i * u.step, lanes) - pilot);
  return (a + b) + (c + d);
}

// The sums of u - centre and of its square.
template <class V>
struct CentredSums {
  V sum, squares;
};

template <bool kPartial, class V>
NN_HD CentredSums<V> centred_pass(Strip<const ScalarOf<V>> u, int64_t steps, int lanes, V centre) {
  const Active<kPartial, V> active(lanes);
  V s0 = splat<V>(0), s1 = s0, q0 = s0, q1 = s0;
  int64_t i = 0;
  for (; i + 2 <= steps; i += 2) {
    const V c0 = active.keep(read<kPartial, V>(u.data + i * u.step, lanes) - centre);
    const V c1 = active.keep(read<kPartial, V>(u.data + (i + 1) * u.step, lanes) - centre);
    s0 += c0, s1 += c1;
    q0 += c0 * c0, q1 += c1 * c1;
  }
  for (; i < steps; ++i) {
    const V c0 = active.keep(read<kPartial, V>(u.data + i * u.step, lanes) - centre);
    s0 += c0;
    q0 += c0 * c0;
  }
  return {s0 + s1, q0 + q1};
}

// The number of steps of the tile that begins at step i.
NN_HD int tile_steps(int64_t i, int64_t steps) { return int(steps - i < kTile ? steps - i : kTile); }

// Sums for the lambda estimate. Each tile is summed separately, to reduce rounding errors. kCache writes
// sign(h) log(1+|h|) to `cache` for the later passes.
template <bool kPartial, bool kCache, class V>
NN_HD void lambda_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                       const Standardizer<V>& standardize, LambdaSums<V>& sums) {
  const Active<kPartial, V> active(lanes);
  for (int64_t first = 0; first < steps; first += kTile) {
    LambdaSums<V> tile;
    const int64_t end = first + tile_steps(first, steps);
    for (int64_t i = first; i < end; ++i) {
      prefetch(u, i);
      if constexpr (kCache) prefetch(cache, i);
      const V h = active.keep(standardize(read<kPartial, V>(u.data + i * u.step, lanes)));
      const V t = magnitude(h), log = log1p_nonneg<V>(t), signed_log = with_sign_of(log, h);
      tile.add(h, t, log, signed_log, ScalarOf<V>(1));
      if constexpr (kCache) write<kPartial, V>(cache.data + i * cache.step, signed_log, lanes);
    }
    sums.add(tile);
  }
}

// What a pass reads: the input, the cached sign(h) log(1+|h|), or the cached x.
enum class From { kInput, kLog, kX };

template <class V>
struct TransformConstants {
  Standardizer<V> standardize;
  Exponents<V> exponents;
};

// Long loops are split into tiles of kTile steps, and each stage of the computation is a separate loop over a tile: the
// dependency chain of a logarithm, a power and their sums is too long for the processor to overlap vectors.

// h and log(1+|h|) of a tile's vectors.
template <bool kPartial, class V>
NN_HD void log_stage(Strip<const ScalarOf<V>> u, int steps, int lanes, const Standardizer<V>& standardize, V* hs,
                     V* logs) {
  for (int i = 0; i < steps; ++i) {
    prefetch_tile(u, i);
    hs[i] = standardize(read<kPartial, V>(u.data + i * u.step, lanes));
    logs[i] = log1p_nonneg<V>(magnitude(hs[i]));
  }
}

// Calls consume(step, x) with x = psi(h) for every vector.
template <bool kPartial, From kFrom, class V, class F>
NN_HD void for_transformed(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                           const TransformConstants<V>& c, F consume) {
  using T = ScalarOf<V>;
  const Exponents<V> exponents = power_exponents(c.exponents);
  const auto psi = [&](V l, V h) {
    const Side<V> side = side_of(h, exponents);
    return V(transform_power(l, side).minus_one * side.inverse);
  };
  if constexpr (kFrom == From::kInput) {
    V hs[kTile], logs[kTile];
    for (int64_t first = 0; first < steps; first += kTile) {
      const int tile = tile_steps(first, steps);
      log_stage<kPartial, V>({u.data + first * u.step, u.step}, tile, lanes, c.standardize, hs, logs);
      for (int i = 0; i < tile; ++i) consume(first + i, psi(logs[i], hs[i]));
    }
  } else {
    for (int64_t i = 0; i < steps; ++i) {
      prefetch(cache, i);
      const V cached = read<kPartial, V>(static_cast<const T*>(cache.data + i * cache.step), lanes);
      if constexpr (kFrom == From::kX)
        consume(i, cached);
      else
        consume(i, psi(magnitude(cached), cached));
    }
  }
}

// Adds all x to `sum`, and writes x to the cache unless kFrom is kInput.
template <bool kPartial, From kFrom, class V>
NN_HD V sum_x_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                   const TransformConstants<V>& c, V sum) {
  const Active<kPartial, V> active(lanes);
  for_transformed<kPartial, kFrom, V>(u, cache, steps, lanes, c, [&](int64_t i, V x) {
    sum += active.keep(x);
    if constexpr (kFrom != From::kInput) write<kPartial, V>(cache.data + i * cache.step, x, lanes);
  });
  return sum;
}

// Adds all |x - centre| to `sum`.
template <bool kPartial, From kFrom, class V>
NN_HD V deviation_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                       const TransformConstants<V>& c, V centre, V sum) {
  const Active<kPartial, V> active(lanes);
  for_transformed<kPartial, kFrom, V>(u, cache, steps, lanes, c,
                                      [&](int64_t, V x) { sum += active.keep(magnitude(V(x - centre))); });
  return sum;
}

// Parameters of the last forward pass, y = (x + noise z) weight + bias.
template <class V>
struct OutputParams {
  V weight, bias, noise;                     // noise = noise_train * s
  Strip<const ScalarOf<V>> weights, biases;  // kPerElement: in place of weight and bias
  Strip<const ScalarOf<V>> normals;          // kNoise
};

template <bool kPartial, From kFrom, bool kNoise, bool kPerElement, class V>
NN_HD void output_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, Strip<ScalarOf<V>> out,
                       int64_t steps, int lanes, const TransformConstants<V>& c, const OutputParams<V>& a) {
  for_transformed<kPartial, kFrom, V>(u, cache, steps, lanes, c, [&](int64_t i, V y) {
    kFrom == From::kInput ? prefetch_tile(out, i) : prefetch(out, i);
    if constexpr (kNoise) y += a.noise * read<kPartial, V>(a.normals.data + i * a.normals.step, lanes);
    V weight = a.weight, bias = a.bias;
    if constexpr (kPerElement) {
      weight = read<kPartial, V>(a.weights.data + i * a.weights.step, lanes);
      bias = read<kPartial, V>(a.biases.data + i * a.biases.step, lanes);
    }
    write<kPartial, V>(out.data + i * out.step, V(y * weight + bias), lanes);
  });
}

// --- The backward pass ------------------------------------------------------------------------------------------

// The sums of the backward pass, per lane. g is the output's gradient; G is g times the weight if the weight varies by
// element, else g.
template <class V>
struct GradientSums {
  V psi_h;    // G psi_h
  V psi_h_h;  // G psi_h h
  V lmbda;    // G psi_lambda
  V w, w_h;   // w and w h; w is lambda's gradient (math/lmbda.h)
  V bias;     // g
  V weight;   // g x
  V noise;    // g z
};

template <class V>
NN_HD GradientSums<V> zero_sums() {
  const V zero = splat<V>(0);
  return {zero, zero, zero, zero, zero, zero, zero, zero};
}

template <class V>
struct GradientConstants {
  TransformConstants<V> transform;
  LambdaGradient<V> lmbda;
};

// Weights that vary by element, and the gradients of weights and biases, summed over the groups so far.
template <class V>
struct ElementGradients {
  Strip<const ScalarOf<V>> weights;
  Strip<ScalarOf<V>> grad_weights, grad_biases;
  V noise;  // noise_train * s
};

template <class V>
NN_HD ElementGradients<V> no_element_gradients() {
  return {{nullptr, 0}, {nullptr, 0}, {nullptr, 0}, splat<V>(0)};
}

template <class V>
struct GradientStrips {
  Strip<const ScalarOf<V>> input, grad;
  Strip<ScalarOf<V>> cache;    // G psi_h; null if not cached
  Strip<ScalarOf<V>> w_cache;  // w; null if not cached
  Strip<const ScalarOf<V>> normals;
};

// (1+t)^eta and psi of a tile's vectors.
template <class V>
NN_HD void power_stage(int steps, const Exponents<V>& exponents, const V* hs, const V* logs, V* powers, V* psis) {
  const Exponents<V> e = power_exponents(exponents);
  for (int i = 0; i < steps; ++i) {
    const Side<V> side = side_of(hs[i], e);
    const PowerPair<V> pair = transform_power(logs[i], side);
    powers[i] = pair.power;
    psis[i] = pair.minus_one * side.inverse;
  }
}

// Constants are passed by value, so that the compiler keeps them in registers while tensors are written.
template <bool kPartial, bool kSeries, bool kNoise, bool kPerElement, class V>
NN_HD void gradient_sums_tile(const GradientStrips<V>& at, int steps, int lanes,
                              GradientConstants<V> c, ElementGradients<V> e,
                              GradientSums<V>& sums) {
  using T = ScalarOf<V>;
  const Active<kPartial, V> active(lanes);
  const bool cached = at.cache.data != nullptr, w_cached = at.w_cache.data != nullptr;
  V hs[kTile], logs[kTile], powers[kTile], psis[kTile];
  log_stage<kPartial, V>(at.input, steps, lanes, c.transform.standardize, hs, logs);
  power_stage(steps, c.transform.exponents, hs, logs, powers, psis);
  GradientSums<V> s = sums;
  for (int i = 0; i < steps; ++i) {
    prefetch(at.grad, i);
    if (cached) prefetch(at.cache, i);
    const V h = hs[i], x = psis[i];
    const V g = read<kPartial, V>(at.grad.data + i * at.grad.step, lanes);
    const V t = magnitude(h), l = logs[i], reciprocal = T(1) / (t + T(1));
    const PsiSlopes<V> psi =
        psi_slopes<kSeries, V>(l, reciprocal, powers[i], magnitude(x), side_of(h, c.transform.exponents));
    V weighted = g;
    if constexpr (kPerElement) {
      weighted = g * read<kPartial, V>(e.weights.data + i * e.weights.step, lanes);
      V y = x;
      if constexpr (kNoise) y += e.noise * read<kPartial, V>(at.normals.data + i * at.normals.step, lanes);
      T* gw = e.grad_weights.data + i * e.grad_weights.step;
      T* gb = e.grad_biases.data + i * e.grad_biases.step;
      write<kPartial, V>(gw, V(read<kPartial, V>(static_cast<const T*>(gw), lanes) + g * y), lanes);
      write<kPartial, V>(gb, V(read<kPartial, V>(static_cast<const T*>(gb), lanes) + g), lanes);
    } else {
      s.bias += active.keep(g);
      s.weight += active.keep(g * x);
      if constexpr (kNoise)
        s.noise += active.keep(g * read<kPartial, V>(at.normals.data + i * at.normals.step, lanes));
    }
    const V through_h = weighted * psi.psi_h;
    const V w = lambda_weight<V>(h, t, l, reciprocal, c.lmbda);
    s.psi_h += active.keep(through_h);
    s.psi_h_h += active.keep(through_h * h);
    s.lmbda += active.keep(weighted * psi.psi_lambda);
    s.w += active.keep(w);
    s.w_h += active.keep(w * h);
    if (cached) write<kPartial, V>(at.cache.data + i * at.cache.step, through_h, lanes);
    if (w_cached) write<kPartial, V>(at.w_cache.data + i * at.w_cache.step, w, lanes);
  }
  sums = s;
}

template <class T>
NN_HD Strip<T> advance(const Strip<T>& strip, int64_t steps) {
  return {strip.data ? strip.data + steps * strip.step : nullptr, strip.step};
}

template <class V>
NN_HD GradientStrips<V> advance(const GradientStrips<V>& at, int64_t steps) {
  return {advance(at.input, steps), advance(at.grad, steps), advance(at.cache, steps), advance(at.w_cache, steps),
          advance(at.normals, steps)};
}

template <class V>
NN_HD ElementGradients<V> advance(ElementGradients<V> e, int64_t steps) {
  return {advance(e.weights, steps), advance(e.grad_weights, steps), advance(e.grad_biases, steps), e.noise};
}

template <bool kPartial, bool kSeries, bool kNoise, bool kPerElement, class V>
NN_HD void gradient_sums_pass(const GradientStrips<V>& at, int64_t steps, int lanes,
                              GradientConstants<V> c, ElementGradients<V> e,
                              GradientSums<V>& sums) {
  for (int64_t i = 0; i < steps; i += kTile)
    gradient_sums_tile<kPartial, kSeries, kNoise, kPerElement, V>(advance(at, i), tile_steps(i, steps), lanes,
                                                                 c, advance(e, i), sums);
}

// The gradient of the input, du = direct G psi_h + lmbda w - offset - slope h; the constants include rstd.
template <class V>
struct InputGradient {
  V direct, lmbda, offset, slope;
};

// What gradient_sums_pass has cached for input_gradient_pass: nothing, G psi_h, or both G psi_h and w.
enum class Cached { kNothing, kThroughH, kBoth };

template <bool kPartial, Cached kCached, bool kPerElement, class V>
NN_HD void input_gradient_tile(const GradientStrips<V>& at, Strip<ScalarOf<V>> out, int steps, int lanes,
                               GradientConstants<V> c, ElementGradients<V> e,
                               InputGradient<V> k) {
  using T = ScalarOf<V>;
  V hs[kTile], logs[kTile], powers[kTile], psis[kTile];
  if constexpr (kCached != Cached::kBoth)
    log_stage<kPartial, V>(at.input, steps, lanes, c.transform.standardize, hs, logs);
  if constexpr (kCached == Cached::kNothing)
    power_stage(steps, c.transform.exponents, hs, logs, powers, psis);
  for (int i = 0; i < steps; ++i) {
    V h, through_h, w;
    if constexpr (kCached == Cached::kBoth) {
      h = c.transform.standardize(read<kPartial, V>(at.input.data + i * at.input.step, lanes));
      w = read<kPartial, V>(static_cast<const T*>(at.w_cache.data + i * at.w_cache.step), lanes);
    } else {
      h = hs[i];
      const V t = magnitude(h), reciprocal = T(1) / (t + T(1));
      w = lambda_weight<V>(h, t, logs[i], reciprocal, c.lmbda);
      if constexpr (kCached == Cached::kNothing) {
        through_h = read<kPartial, V>(at.grad.data + i * at.grad.step, lanes) * (powers[i] * reciprocal);
        if constexpr (kPerElement) through_h *= read<kPartial, V>(e.weights.data + i * e.weights.step, lanes);
      }
    }
    prefetch(out, i);
    if constexpr (kCached != Cached::kNothing)
      through_h = read<kPartial, V>(static_cast<const T*>(at.cache.data + i * at.cache.step), lanes);
    write<kPartial, V>(out.data + i * out.step,
                       V((k.direct * through_h + k.lmbda * w) - (k.slope * h + k.offset)), lanes);
  }
}

template <bool kPartial, Cached kCached, bool kPerElement, class V>
NN_HD void input_gradient_pass(const GradientStrips<V>& at, Strip<ScalarOf<V>> out, int64_t steps, int lanes,
                               GradientConstants<V> c, ElementGradients<V> e,
                               InputGradient<V> k) {
  for (int64_t i = 0; i < steps; i += kTile)
    input_gradient_tile<kPartial, kCached, kPerElement, V>(advance(at, i), advance(out, i), tile_steps(i, steps),
                                                         lanes, c, advance(e, i), k);
}

}  // namespace
}  // namespace normnorm
