// The inner loops of the backward pass, laid out as those of the forward pass (forward_passes.h).
#pragma once

#include "forward_passes.h"

namespace normnorm {
namespace {

// The reductions of the backward pass, in every lane; G is the gradient times the weight where that varies by
// element.
template <class V>
struct GradientSums {
  V psi_h;    // G psi_h
  V psi_h_h;  // G psi_h h
  V lmbda;    // G psi_lambda
  V w, w_h;   // w and w h, the gradient of lambda
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

// Where per-element weights live and where their gradients are summed.
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
  Strip<ScalarOf<V>> cache;    // G psi_h, where it is kept
  Strip<ScalarOf<V>> w_cache;  // w, where it is kept
  Strip<const ScalarOf<V>> normals;
};

// (1+t)^eta and |psi| of a tile's vectors.
template <bool kPartial, class V>
NN_HD void power_stage(Strip<const ScalarOf<V>> u, int steps, int lanes, const TransformConstants<V>& c,
                       const V* logs, V* powers, V* psis) {
  for (int i = 0; i < steps; ++i) {
    const V h = c.standardize(read<kPartial, V>(u.data + i * u.step, lanes));
    const Side<V> side = side_of(h, c.exponents);
    const ExpPair<V> power = exp_pair<V>(clamp_exponent<V>(side.eta * logs[i]));
    powers[i] = power.exp;
    psis[i] = power.expm1 * side.inverse;
  }
}

template <bool kPartial, bool kCareful, bool kNoise, bool kPerElement, class V>
NN_HD void gradient_sums_tile(const GradientStrips<V>& at, int steps, int lanes,
                              const GradientConstants<V>& c, const ElementGradients<V>& e,
                              GradientSums<V>& sums) {
  using T = ScalarOf<V>;
  const Active<kPartial, V> active(lanes);
  const bool cached = at.cache.data != nullptr, w_cached = at.w_cache.data != nullptr;
  V logs[kTile], powers[kTile], psis[kTile];
  log_stage<kPartial, V>(at.input, steps, lanes, c.transform.standardize, logs);
  power_stage<kPartial, V>(at.input, steps, lanes, c.transform, logs, powers, psis);
  GradientSums<V> s = sums;
  for (int i = 0; i < steps; ++i) {
    ask_ahead(at.grad, i);
    if (cached) ask_ahead(at.cache, i);
    const V h = c.transform.standardize(read<kPartial, V>(at.input.data + i * at.input.step, lanes));
    const V g = read<kPartial, V>(at.grad.data + i * at.grad.step, lanes);
    const V t = magnitude(h), l = logs[i], reciprocal = T(1) / (t + T(1));
    const PsiSlopes<V> psi =
        psi_slopes<kCareful, V>(l, reciprocal, powers[i], psis[i], side_of(h, c.transform.exponents));
    const V x = with_sign_of(psis[i], h);
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
NN_HD Strip<T> behind(const Strip<T>& strip, int64_t steps) {
  return {strip.data ? strip.data + steps * strip.step : nullptr, strip.step};
}

template <class V>
NN_HD GradientStrips<V> behind(const GradientStrips<V>& at, int64_t steps) {
  return {behind(at.input, steps), behind(at.grad, steps), behind(at.cache, steps), behind(at.w_cache, steps),
          behind(at.normals, steps)};
}

template <class V>
NN_HD ElementGradients<V> behind(const ElementGradients<V>& e, int64_t steps) {
  return {behind(e.weights, steps), behind(e.grad_weights, steps), behind(e.grad_biases, steps), e.noise};
}

template <bool kPartial, bool kCareful, bool kNoise, bool kPerElement, class V>
NN_HD void gradient_sums_pass(const GradientStrips<V>& at, int64_t steps, int lanes,
                              const GradientConstants<V>& c, const ElementGradients<V>& e,
                              GradientSums<V>& sums) {
  for (int64_t i = 0; i < steps; i += kTile)
    gradient_sums_tile<kPartial, kCareful, kNoise, kPerElement, V>(behind(at, i), tile_steps(i, steps), lanes,
                                                                 c, behind(e, i), sums);
}

// du = direct G psi_h + lmbda w - offset - slope h, the group's constants having absorbed rstd.
template <class V>
struct InputGradient {
  V direct, lmbda, offset, slope;
};

// What the reduction has left for the elementwise pass: nothing, G psi_h, or that and w.
enum class Kept { kNothing, kThroughH, kBoth };

template <bool kPartial, Kept kKept, bool kPerElement, class V>
NN_HD void input_gradient_tile(const GradientStrips<V>& at, Strip<ScalarOf<V>> out, int steps, int lanes,
                               const GradientConstants<V>& c, const ElementGradients<V>& e,
                               const InputGradient<V>& k) {
  using T = ScalarOf<V>;
  V logs[kTile], powers[kTile], psis[kTile];
  if constexpr (kKept != Kept::kBoth)
    log_stage<kPartial, V>(at.input, steps, lanes, c.transform.standardize, logs);
  if constexpr (kKept == Kept::kNothing)
    power_stage<kPartial, V>(at.input, steps, lanes, c.transform, logs, powers, psis);
  for (int i = 0; i < steps; ++i) {
    const V h = c.transform.standardize(read<kPartial, V>(at.input.data + i * at.input.step, lanes));
    V through_h, w;
    if constexpr (kKept == Kept::kBoth) {
      w = read<kPartial, V>(static_cast<const T*>(at.w_cache.data + i * at.w_cache.step), lanes);
    } else {
      const V t = magnitude(h), reciprocal = T(1) / (t + T(1));
      w = lambda_weight<V>(h, t, logs[i], reciprocal, c.lmbda);
      if constexpr (kKept == Kept::kNothing) {
        through_h = read<kPartial, V>(at.grad.data + i * at.grad.step, lanes) * (powers[i] * reciprocal);
        if constexpr (kPerElement) through_h *= read<kPartial, V>(e.weights.data + i * e.weights.step, lanes);
      }
    }
    if constexpr (kKept == Kept::kThroughH) ask_ahead(at.cache, i);
    if constexpr (kKept != Kept::kNothing)
      through_h = read<kPartial, V>(static_cast<const T*>(at.cache.data + i * at.cache.step), lanes);
    write<kPartial, V>(out.data + i * out.step,
                       V((k.direct * through_h + k.lmbda * w) - (k.slope * h + k.offset)), lanes);
  }
}

template <bool kPartial, Kept kKept, bool kPerElement, class V>
NN_HD void input_gradient_pass(const GradientStrips<V>& at, Strip<ScalarOf<V>> out, int64_t steps, int lanes,
                               const GradientConstants<V>& c, const ElementGradients<V>& e,
                               const InputGradient<V>& k) {
  for (int64_t i = 0; i < steps; i += kTile)
    input_gradient_tile<kPartial, kKept, kPerElement, V>(behind(at, i), behind(out, i), tile_steps(i, steps),
                                                         lanes, c, behind(e, i), k);
}

}  // namespace
}  // namespace normnorm
