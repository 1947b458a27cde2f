// The functions of csrc/math for Python, for tests against mpmath and SciPy.
//
// float32 functions run on SIMD vectors of the instruction set this file is compiled for, with a partial one at the end,
// float64 functions on scalars. NN_MODULE is the name of the Python module.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "../../csrc/cpu/io.h"
#include "../../csrc/cpu/noise.h"
#include "../../csrc/math/moments.h"
#include "../../csrc/math/projected_error.h"
#include "../../csrc/math/transform.h"

namespace py = pybind11;
using namespace normnorm;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// f of every element.
template <class F>
py::array_t<float> map(Array<float> in, F f) {
  py::array_t<float> out(in.size());
  const float* from = in.data();
  float* to = out.mutable_data();
  const int64_t size = in.size();
  for (int64_t i = 0; i < size; i += kLanes<VFloat>) {
    const int rest = int(size - i);
    if (rest >= kLanes<VFloat>)
      store_dense<VFloat>(to + i, f(load_dense<VFloat>(from + i)));
    else
      store_some<VFloat>(to + i, f(load_some<VFloat>(from + i, rest)), rest);
  }
  return out;
}
template <class F>
py::array_t<double> map(Array<double> in, F f) {
  py::array_t<double> out(in.size());
  for (int64_t i = 0; i < in.size(); ++i) out.mutable_data()[i] = f(in.data()[i]);
  return out;
}

template <class V, class T>
Exponents<V> spread(const Exponents<T>& e) {
  return {splat<V>(e.eta_pos),     splat<V>(e.eta_neg),    splat<V>(e.inverse_pos),
          splat<V>(e.inverse_neg), splat<V>(e.active_pos), splat<V>(e.active_neg)};
}

// The functions that exist for both dtypes, under the same names.
template <class T>
void bind_real(py::module_& m) {
  m.def("log1p", [](Array<T> a) { return map(a, [](auto t) { return log1p_nonneg<decltype(t)>(t); }); });
  m.def("power", [](Array<T> a) { return map(a, [](auto t) { return power_pair<decltype(t)>(t).power; }); });
  m.def("power_minus_one", [](Array<T> a) {
    return map(a, [](auto t) { return power_pair<decltype(t)>(t).minus_one; });
  });
  m.def("projected_error", [](Array<T> a) {
    return py::make_tuple(map(a, [](auto t) { return projected_error<decltype(t)>(t).value; }),
                          map(a, [](auto t) { return projected_error<decltype(t)>(t).slope; }));
  });
  m.def("psi", [](Array<T> a, T lmbda, T transform_eps) {
    const auto e = make_exponents<T>(lmbda, Settings<T>{.transform_eps = transform_eps});
    return map(a, [&](auto h) {
      using V = decltype(h);
      const auto side = side_of(h, power_exponents(spread<V>(e)));
      return V(transform_power(log1p_nonneg<V>(magnitude(h)), side).minus_one * side.inverse);
    });
  });
  const auto slope = [](bool by_lambda) {
    return [by_lambda](Array<T> a, T lmbda, T transform_eps) {
      const auto e = make_exponents<T>(lmbda, Settings<T>{.transform_eps = transform_eps});
      return map(a, [&](auto h) {
        using V = decltype(h);
        const V t = magnitude(h), l = log1p_nonneg<V>(t), reciprocal = T(1) / (t + T(1));
        const auto side = side_of(h, spread<V>(e));
        const auto pair = transform_power(l, side_of(h, power_exponents(spread<V>(e))));
        const V psi = pair.minus_one * side.inverse;
        const auto s = has_small_exponent(e, T(0.25)) ? psi_slopes<true, V>(l, reciprocal, pair.power, psi, side)
                                             : psi_slopes<false, V>(l, reciprocal, pair.power, psi, side);
        return by_lambda ? s.psi_lambda : s.psi_h;
      });
    };
  };
  m.def("psi_h", slope(false));
  m.def("psi_lambda", slope(true));
}

py::array_t<uint32_t> lane_words(uint64_t seed, uint32_t stream, uint64_t first, int64_t counters) {
  py::array_t<uint32_t> out(4 * counters);
  const LaneKeys keys(seed);
  for (int64_t c = 0; c < counters; c += kWordBatches * kBatchCounters) {
    float batches[kWordBatches * kNoiseBatch];
    word_batches<kWordBatches>(batches, {first}, c, keys, stream);
    for (int64_t i = 0; i < kWordBatches * kLanes<VFloat>; ++i) {
      const float* lane = batches + i / kLanes<VFloat> * kNoiseBatch + i % kLanes<VFloat>;
      const int64_t half = i / kLanes<VFloat> * 2 * kBatchCounters + half_of_lane(int(i % kLanes<VFloat>));
      if (2 * c + half >= 2 * counters) continue;
      uint32_t* words = out.mutable_data() + 2 * (2 * c + half);
      words[0] = bit_cast<uint32_t>(lane[0]), words[1] = bit_cast<uint32_t>(lane[2 * kLanes<VFloat>]);
    }
  }
  return out;
}

template <class T>
py::array_t<T> normals_of(uint64_t seed, uint32_t stream, int64_t position, int64_t count, bool transposed,
                          int64_t rows, int64_t cols) {
  const NoiseSource source{seed, stream, {{}, transposed, rows, cols}};
  py::array_t<T> buffer(count + kNoiseSlack), out(count);
  const T* z = normals(buffer.mutable_data(), position, count, source);
  for (int64_t i = 0; i < count; ++i) out.mutable_data()[i] = z[i];
  return out;
}

template <class T>
py::array_t<T> normals_of_short_runs(uint64_t seed, uint32_t stream, int64_t position, int64_t step, int64_t length,
                                     int64_t runs) {
  py::array_t<T> buffer(runs * length + kNoiseSlack), out(runs * length);
  normals_of_runs(buffer.mutable_data(), position, step, length, runs, {seed, stream, {}});
  for (int64_t i = 0; i < out.size(); ++i) out.mutable_data()[i] = buffer.data()[i];
  return out;
}

template <class Half>
void bind_half(py::module_& m, const char* widen_name, const char* narrow_name) {
  m.def(widen_name, [](Array<uint16_t> a) {
    py::array_t<float> out(a.size());
    widen_run(reinterpret_cast<const Half*>(a.data()), out.mutable_data(), a.size());
    return out;
  });
  m.def(narrow_name, [](Array<float> a) {
    py::array_t<uint16_t> out(a.size());
    narrow_run(a.data(), reinterpret_cast<Half*>(out.mutable_data()), a.size());
    return out;
  });
}

}  // namespace

PYBIND11_MODULE(NN_MODULE, m) {
  auto single = m.def_submodule("float32"), whole = m.def_submodule("float64");
  bind_real<float>(single);
  bind_real<double>(whole);
  bind_half<BFloat16>(m, "widen_bfloat16", "narrow_bfloat16");
  bind_half<Float16>(m, "widen_float16", "narrow_float16");

  m.def("on_circle", [](Array<uint32_t> words) {
    py::array_t<float> cos(words.size()), sin(words.size());
    for (int64_t i = 0; i < words.size(); ++i) {
      const auto point = on_circle<float>(1.0f, words.data()[i]);
      cos.mutable_data()[i] = point.first, sin.mutable_data()[i] = point.second;
    }
    return py::make_tuple(cos, sin);
  });
  m.def("minus_two_log_uniform", [](Array<uint32_t> words) {
    py::array_t<float> out(words.size());
    for (int64_t i = 0; i < words.size(); ++i)
      out.mutable_data()[i] = minus_two_log_uniform<float>(words.data()[i]);
    return out;
  });
  m.def("philox", [](Array<uint32_t> counter, uint32_t key0, uint32_t key1) {
    const auto w = philox({{counter.at(0), counter.at(1), counter.at(2), counter.at(3)}}, key0, key1);
    return py::make_tuple(w.word[0], w.word[1], w.word[2], w.word[3]);
  });
  m.def("lane_words", &lane_words);
  single.def("normals", &normals_of<float>);
  whole.def("normals", &normals_of<double>);
  single.def("normals_of_runs", &normals_of_short_runs<float>);
  whole.def("normals_of_runs", &normals_of_short_runs<double>);
  // moments as (count, mean, low, m2)
  using Four = std::tuple<double, double, double, double>;
  m.def("merge", [](const Four& a, const Four& b) {
    const auto s = merge({std::get<0>(a), std::get<1>(a), std::get<2>(a), std::get<3>(a)},
                         {std::get<0>(b), std::get<1>(b), std::get<2>(b), std::get<3>(b)});
    return Four(s.count, s.mean, s.low, s.m2);
  });
  m.def("recentred_moments", [](double count, double centre, double sum, double squares) {
    const auto s = recentred_moments(count, centre, sum, squares);
    return Four(s.count, s.mean, s.low, s.m2);
  });
}
