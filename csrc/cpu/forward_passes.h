// The inner loops of the forward rounds. Each walks `steps` vectors that lie `step` elements apart.
//
// A rows walk steps over one contiguous stretch of a group (step = lanes) with the same constants in every
// lane; a columns walk steps down a strip of columns (step = row stride) with a group, and its constants, in
// each lane. kPartial vectors hold fewer elements than lanes: the rest is neither read, nor written, nor
// summed.
#pragma once

#include "../math/lmbda.h"
#include "../math/transform.h"
#include "storage.h"

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

// h = (u - mean) rstd, re-centred: `mean` is rounded and shift = -mean(u - mean) rstd puts back what that lost.
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

// Asks for what a loop at step i will want a tile later, and for the right to write it. Strips of columns
// have a stride that hardware does not foresee, and the kernels compute long enough on each vector to wait
// for every one of them.
constexpr int kTile = 32;
template <class T>
NN_HD void ask_ahead(const Strip<const T>& s, int64_t i) {
  __builtin_prefetch(s.data + (i + kTile) * s.step);
}
template <class T>
NN_HD void ask_ahead(const Strip<T>& s, int64_t i) {
  __builtin_prefetch(s.data + (i + kTile) * s.step, 1);
}

template <bool kPartial, class V>
NN_HD V sum_pass(Strip<const ScalarOf<V>> u, int64_t steps, int lanes, V pilot) {
  const Active<kPartial, V> active(lanes);
  V a = splat<V>(0), b = a, c = a, d = a;
  int64_t i = 0;
  for (; i + 4 <= steps; i += 4) {
    const ScalarOf<V>* p = u.data + i * u.step;
    for (int k = 0; k < 4; ++k) ask_ahead(u, i + k);
    a += active.keep(read<kPartial, V>(p, lanes) - pilot);
    b += active.keep(read<kPartial, V>(p + u.step, lanes) - pilot);
    c += active.keep(read<kPartial, V>(p + 2 * u.step, lanes) - pilot);
    d += active.keep(read<kPartial, V>(p + 3 * u.step, lanes) - pilot);
  }
  for (; i < steps; ++i) a += active.keep(read<kPartial, V>(u.data + i * u.step, lanes) - pilot);
  return (a + b) + (c + d);
}

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

// Sums the terms of the lambda estimate; keeps sign(h) log(1+|h|) in `cache` for the later rounds.
template <bool kPartial, bool kCache, class V>
NN_HD void lambda_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                       const Standardizer<V>& standardize, LambdaTerms<V>& sums) {
  const Active<kPartial, V> active(lanes);
  LambdaTerms<V> s = sums;
  for (int64_t i = 0; i < steps; ++i) {
    ask_ahead(u, i);
    if constexpr (kCache) ask_ahead(cache, i);
    const V h = standardize(read<kPartial, V>(u.data + i * u.step, lanes));
    const V t = magnitude(h);
    const LambdaTerms<V> term = lambda_terms<V>(h, t, log1p_nonneg<V>(t));
    s.hd += active.keep(term.hd);
    s.log += active.keep(term.log);
    s.d += active.keep(term.d);
    s.e += active.keep(term.e);
    if constexpr (kCache) write<kPartial, V>(cache.data + i * cache.step, term.log, lanes);
  }
  sums = s;
}

// Where a round finds x: it starts from the input, from the cached signed logarithm, or from the cached x.
enum class From { kInput, kLog, kX };

template <class V>
struct TransformConstants {
  Standardizer<V> standardize;
  Exponents<V> exponents;
};

// Loops over many vectors are taken in tiles of this many, each stage of the computation a loop of its own
// over the tile: a chain of a logarithm, a power and their sums would be too long for the processor to
// overlap vectors.

// log(1+|h|) of a tile's vectors.
template <bool kPartial, class V>
NN_HD void log_stage(Strip<const ScalarOf<V>> u, int steps, int lanes, const Standardizer<V>& standardize,
                     V* logs) {
  for (int i = 0; i < steps; ++i) {
    ask_ahead(u, i);
    logs[i] = log1p_nonneg<V>(magnitude(standardize(read<kPartial, V>(u.data + i * u.step, lanes))));
  }
}

// The length of the tile that begins at step i.
NN_HD int tile_steps(int64_t i, int64_t steps) { return int(steps - i < kTile ? steps - i : kTile); }

// consume(step, x) for every vector's x = psi(h).
template <bool kPartial, From kFrom, class V, class F>
NN_HD void for_transformed(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                           const TransformConstants<V>& c, F consume) {
  using T = ScalarOf<V>;
  if constexpr (kFrom == From::kInput) {
    V logs[kTile];
    for (int64_t first = 0; first < steps; first += kTile) {
      const int tile = tile_steps(first, steps);
      const Strip<const ScalarOf<V>> at{u.data + first * u.step, u.step};
      log_stage<kPartial, V>(at, tile, lanes, c.standardize, logs);
      for (int i = 0; i < tile; ++i) {
        const V h = c.standardize(read<kPartial, V>(at.data + i * at.step, lanes));
        consume(first + i, with_sign_of(psi_magnitude<V>(logs[i], side_of(h, c.exponents)), h));
      }
    }
  } else {
    for (int64_t i = 0; i < steps; ++i) {
      ask_ahead(cache, i);
      const V kept = read<kPartial, V>(static_cast<const T*>(cache.data + i * cache.step), lanes);
      if constexpr (kFrom == From::kX)
        consume(i, kept);
      else
        consume(i, with_sign_of(psi_magnitude<V>(magnitude(kept), side_of(kept, c.exponents)), kept));
    }
  }
}

// Sums x, and keeps it in the cache where there is one.
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

// Sums |x - centre|.
template <bool kPartial, From kFrom, class V>
NN_HD V deviation_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, int64_t steps, int lanes,
                       const TransformConstants<V>& c, V centre, V sum) {
  const Active<kPartial, V> active(lanes);
  for_transformed<kPartial, kFrom, V>(u, cache, steps, lanes, c,
                                      [&](int64_t, V x) { sum += active.keep(magnitude(V(x - centre))); });
  return sum;
}

// What the last round needs besides x. weight and bias are one value for all steps, or one per element
// (kPerElement).
template <class V>
struct Affinity {
  V weight, bias, noise;                              // noise = noise_train * s
  Strip<const ScalarOf<V>> weights, biases, normals;  // read where the template flags say so
};

template <bool kPartial, From kFrom, bool kNoise, bool kPerElement, class V>
NN_HD void output_pass(Strip<const ScalarOf<V>> u, Strip<ScalarOf<V>> cache, Strip<ScalarOf<V>> out,
                       int64_t steps, int lanes, const TransformConstants<V>& c, const Affinity<V>& a) {
  for_transformed<kPartial, kFrom, V>(u, cache, steps, lanes, c, [&](int64_t i, V y) {
    if constexpr (kFrom != From::kLog) ask_ahead(out, i);
    if constexpr (kNoise) y += a.noise * read<kPartial, V>(a.normals.data + i * a.normals.step, lanes);
    V weight = a.weight, bias = a.bias;
    if constexpr (kPerElement) {
      weight = read<kPartial, V>(a.weights.data + i * a.weights.step, lanes);
      bias = read<kPartial, V>(a.biases.data + i * a.biases.step, lanes);
    }
    write<kPartial, V>(out.data + i * out.step, V(y * weight + bias), lanes);
  });
}

}  // namespace
}  // namespace normnorm
