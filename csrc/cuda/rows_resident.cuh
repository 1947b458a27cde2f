// The rows layout, resident: a thread group keeps its group in registers and shared memory between the rounds. Device
// memory is read once (backward: twice, input and gradient) and written once.
#pragma once

#include "math.cuh"
#include "reduce.cuh"
#include "rows.cuh"
#include "tile_cache.cuh"

namespace normnorm {
namespace cuda {
namespace {

// Prefetches into L2 the group that a thread group processes next, so that its first round waits for L2 and not for device
// memory. A lane of each warp takes a run; short runs, which would take an instruction each, are left out.
template <class T, bool kGrad, class Threads, class Real>
__device__ __forceinline__ void prefetch_group(const KernelArgs<Real>& a, const Threads& threads, uint32_t group) {
  constexpr int64_t kShortRun = 1024;  // bytes
  const int64_t bytes = a.length * int64_t(sizeof(T));
  if (group >= a.groups || bytes < kShortRun) return;
  const GroupPlace g = locate_group(a, group);
  uint32_t first = 0;  // the same in all threads, so that the warp stays together
#pragma unroll 1
  do {
    const uint32_t run = first + threads.rank() / 32;
    prefetch_bytes(static_cast<const T*>(a.input) + g.input + int64_t(run) * a.at_input.run, bytes, run < a.runs);
    if (kGrad) prefetch_bytes(static_cast<const T*>(a.grad) + g.grad + int64_t(run) * a.at_grad.run, bytes, run < a.runs);
    first += threads.size() / 32;
  } while (first < a.runs);
}

// --- forward ---

// Chunks of a group that a thread keeps in registers.
template <class T>
constexpr int kForwardRegister = sizeof(T) == 8 ? 4 : 32 / kChunkOf<T>;

template <class Real>
__device__ inline void write_statistics(const KernelArgs<Real>& a, uint32_t group, const Moments1<Real>& m,
                                        const Estimate<Real>& e) {
  Real* s = a.stats + group;
  const int64_t groups = a.groups;
  s[kMean * groups] = m.mean;
  s[kMeanLow * groups] = m.mean_low;
  s[kRstd * groups] = m.rstd;
  s[kLmbda * groups] = e.lmbda;
  s[kMeanHd * groups] = e.mean_hd;
  s[kMeanD * groups] = e.mean_d;
  s[kCurvature * groups] = e.curvature;
}

// Computes weight (x + noise z) + bias and the epilogue for one chunk, and stores it. noise includes kNormalUnit; residual
// is what was fetched.
template <class T, bool kRagged, bool kNoise, bool kFused, class Raw, class Real>
__device__ __forceinline__ void output_round(const KernelArgs<Real>& a, const GroupPlace& g, const ChunkPlace& c,
                                             const PhiloxSchedule& keys, Real noise, GroupAffine<Real> affine,
                                             const Raw& residual, Real (&x)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if (draws_noise<kNoise, kFused>(a)) add_noise<kRagged>(a, g, c, keys, noise, x);
  if (a.affine == Affine::kPerElement) {
    Real weight[N], bias[N];
    const auto both = [&](bool in_storage) {
      element_parameters<T, kRagged>(a.weight, in_storage, c, weight);
      element_parameters<T, kRagged>(a.bias, in_storage, c, bias);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = x[j] * weight[j] + bias[j];
    };
    if (a.parameters == Parameters::kStorage) {
      both(true);
    } else if (a.parameters == Parameters::kCompute) {
      both(false);
    } else {
      if (a.weight) {
        element_parameters<T, kRagged>(a.weight, a.weight_in_storage, c, weight);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] *= weight[j];
      }
      if (a.bias) {
        element_parameters<T, kRagged>(a.bias, a.bias_in_storage, c, bias);
#pragma unroll
        for (int j = 0; j < N; ++j) x[j] += bias[j];
      }
    }
  } else {
    if (a.affine == Affine::kPerRun) affine = run_affine<T>(a, g.inner * a.runs + c.run);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] = x[j] * affine.weight + affine.bias;
  }
  apply_epilogue<kFused>(ChunkAt<T, kRagged>{g, c}, a.fused, residual, x);
  write_chunk<T, kRagged>(a.output, g.output, a.at_output, c, x);
}

template <class T, bool kRagged, bool kNoise, class Threads, int kRegister = kForwardRegister<T>, bool kFused = false>
class ForwardGroup {
  static constexpr int N = kChunkOf<T>;
  using At = ChunkAt<T, kRagged>;
  using Real = RealOf<T>;
  using Chunk = Real (&)[1][N];
  using Raw = InputFetch<T, kFused, kRagged, InRegisters>;

 public:
  __device__ ForwardGroup(const KernelArgs<Real>& a, Threads& threads)
      : a_(a), threads_(threads), cache_(a.chunks, threads.rank(), threads.size()) {}

  // Each thread sums around its own pilot, the mean of its first chunk, so that an offset of the data costs no precision.
  // Leaves u minus the pilot.
  __device__ __forceinline__ Moments1<Real> moments(const GroupPlace& g) {
    Real pilot = 0, sum = 0, squares = 0, count = 0;
    const auto load = [&](uint32_t chunk, auto& raw) {
      fetch<T, kRagged>(a_.input, g.input, a_.at_input, locate_chunk<kRagged, N>(a_, g, chunk), raw.u);
      if constexpr (kFused) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
        fetch_fused<kFused>(At{g, c}, a_.fused.addend, raw.beside);
      }
    };
    cache_.template fill<Raw>(load, [&](Chunk x, uint32_t chunk, uint32_t slot, const auto& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      values<T, kRagged>(a_.input, g.input, a_.at_input, c, raw.u, x[0]);
      add_and_write_sum<T, kFused>(At{g, c}, a_.fused, raw.beside, x[0]);
      const int elements = kRagged ? c.span.count() : N;
      if (kRagged ? count == Real(0) : slot == 0) pilot = chunk_sum(x[0]) / Real(elements > 0 ? elements : 1);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        x[0][j] = !kRagged || c.span.has(j) ? x[0][j] - pilot : Real(0);
        sum += x[0][j];
        squares += x[0][j] * x[0][j];
      }
      if (kRagged) count += Real(elements);
    });
    if (!kRagged) count = Real(opaque(cache_.count()) * uint32_t(N));  // opaque: not kept as a double between groups
    return finish(g, pilot, count, sum, squares);
  }

  // Leaves the signed logarithms; elements outside the run have h = 0, which adds nothing.
  __device__ __forceinline__ Estimate<Real> estimate(const GroupPlace& g, const Moments1<Real>& m) {
    LambdaSums<Real> terms;
    const Real shift = (pilot_ - m.mean_low) * m.rstd;
    cache_.template each<true, true>([&](Chunk x, uint32_t chunk, uint32_t) {
      const Span span = locate_chunk<kRagged, N>(a_, g, chunk).span;
#pragma unroll
      for (int j = 0; j < N; ++j)
        x[0][j] = add_lambda_terms(terms, !kRagged || span.has(j) ? x[0][j] * m.rstd + shift : Real(0));
    });
    Real sums[4];
    lambda_totals(terms, sums);
    threads_.sum(sums);
    return finish_lambda(sums, m.rstd, a_.inverse_count, a_.settings);
  }

  // Leaves x; returns its mean.
  __device__ __forceinline__ Real transform(const Exponents<Real>& e, PrecisionPath path) {
    Real total[1] = {0};
    with_path(path, [&](auto tag) {
      cache_.template each<true, true>([&](Chunk x, uint32_t, uint32_t) {
        transform_chunk<tag.value>(x[0], e);
#pragma unroll
        for (int j = 0; j < N; ++j) total[0] += x[0][j];
      });
    });
    threads_.sum(total);
    return total[0] * a_.inverse_count;
  }

  __device__ __forceinline__ Real deviation(const GroupPlace& g, Real mean) {
    Real total[1] = {0};
    cache_.template each<true, false>([&](Chunk x, uint32_t chunk, uint32_t) {
      const Span span = locate_chunk<kRagged, N>(a_, g, chunk).span;
#pragma unroll
      for (int j = 0; j < N; ++j) total[0] += !kRagged || span.has(j) ? absolute(x[0][j] - mean) : Real(0);
    });
    threads_.sum(total);
    return total[0] * a_.inverse_count;
  }

  // The last round, from x.
  __device__ __forceinline__ void write_noisy(const GroupPlace& g, const PhiloxSchedule& keys, Real noise) {
    const GroupAffine<Real> affine = group_affine<T>(a_, g);
    each_output(g, [&](Chunk x, uint32_t chunk, uint32_t, const Residual& residual) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      output_round<T, kRagged, true, kFused>(a_, g, c, keys, noise, affine, residual, x[0]);
    });
  }

  // The last round where there is no noise, from the signed logarithms.
  __device__ __forceinline__ void write_plain(const GroupPlace& g, const Exponents<Real>& e, PrecisionPath path) {
    const GroupAffine<Real> affine = group_affine<T>(a_, g);
    with_path(path, [&](auto tag) {
      each_output(g, [&](Chunk x, uint32_t chunk, uint32_t, const Residual& residual) {
        transform_chunk<tag.value>(x[0], e);
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
        output_round<T, kRagged, false, kFused>(a_, g, c, PhiloxSchedule(), Real(0), affine, residual, x[0]);
      });
    });
  }

 private:
  const KernelArgs<Real>& a_;
  Threads& threads_;

  // f(values, chunk, slot, residual) over the cached chunks.
  using Residual = FusedFetch<T, kFused, kRagged>;
  template <class F>
  __device__ __forceinline__ void each_output(const GroupPlace& g, F f) {
    const auto load = [&](uint32_t chunk, Residual& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, g, chunk);
      fetch_fused<kFused>(At{g, c}, a_.fused.residual, raw);
    };
    cache_.template each_with<Residual>(load, f);
  }

  // The group's first element with its addend, not rounded to storage.
  __device__ __forceinline__ Real first_element(const GroupPlace& g) const {
    Real first = to_real(static_cast<const T*>(a_.input)[g.input]);
    if constexpr (kFused) {
      const FusedTensor& addend = a_.fused.addend;
      if (addend.data)
        first += to_real(static_cast<const T*>(addend.data)[group_offset<Real>(addend.at, g.outer, g.inner)]);
    }
    return first;
  }

  // The group's moments from those of its threads, and pilot_. For float the totals are in double, around the group's first
  // element: one reduction, where float takes two. The first element lies within sqrt(n) deviations of the mean, so that
  // cancellation costs at most n 1e-16 of the variance, however far the group is from zero.
  __device__ __forceinline__ Moments1<Real> finish(const GroupPlace& g, Real pilot, Real count, Real sum, Real squares) {
    if constexpr (sizeof(Real) == 4) {
      const Real first = first_element(g);
      const double from_first = double(pilot) - first, shifted = from_first * count + sum;
      double total[2] = {shifted, squares + from_first * (shifted + sum)};
      threads_.sum(total);
      const double distance = total[0] * a_.inverse_count_double, mean = first + distance;
      const double variance = total[1] * a_.inverse_count_double - distance * distance;
      const Real rounded = Real(mean), low = Real(mean - rounded), nearest = Real(variance);
      pilot_ = pilot - rounded;
      return {rounded, low, fast_rsqrt((nearest < 0 ? Real(0) : nearest) + a_.settings.eps) + in_range(nearest)};
    } else {
      Real total[1] = {pilot * count + sum};
      threads_.sum(total);
      const Real mean = total[0] * a_.inverse_count;
      pilot_ = pilot - mean;
      const Real centred_sum = sum + count * pilot_;
      Real centred[2] = {centred_sum, squares + pilot_ * (sum + centred_sum)};
      threads_.sum(centred);
      return finish_moments(mean, centred[0], centred[1], a_.inverse_count, a_.settings.eps);
    }
  }

  TileCache<Real, N, kRegister, 1, kFused> cache_;
  Real pilot_ = 0;  // minus the group's rounded mean
};

template <class T, bool kRagged, bool kNoise, class Threads, bool kFused>
__global__ void __launch_bounds__(kForwardBlock, 1)
rows_forward(const KernelArgs<RealOf<T>> a, typename Threads::Sync sync) {
  using Real = RealOf<T>;
  Threads threads(sync);
  ForwardGroup<T, kRagged, kNoise, Threads, kForwardRegister<T>, kFused> pass(a, threads);
  const PhiloxSchedule keys(draws_noise<kNoise, kFused>(a) ? uint64_t(*a.seed) : 0);
#pragma unroll 1
  for (uint32_t group = threads.index(); group < a.groups; group += threads.count()) {
    const GroupPlace g = locate_group(a, group);
    const Moments1<Real> m = pass.moments(g);
    prefetch_group<T, false>(a, threads, group + threads.count());
    const Estimate<Real> estimate = pass.estimate(g, m);
    const Exponents<Real> e = make_exponents<Real>(estimate.lmbda, a.settings);
    const PrecisionPath path = precision_path(e, a.settings, false);
    // before the remaining rounds, which need the registers
    if (threads.rank() == 0) write_statistics(a, group, m, estimate);
    Real scale = 0;
    if constexpr (kNoise) {
      const bool noisy = draws_noise<kNoise, kFused>(a);
      const Real mean = pass.transform(e, path);
      if (noisy) scale = a.given_scale ? a.stats[int64_t(kNoiseScale) * a.groups + group] : pass.deviation(g, mean);
      const Real noise = a.noise_train * scale * kNormalUnit<Real>;
      pass.write_noisy(g, keys, noise);
    } else {
      pass.write_plain(g, e, path);
    }
    if (threads.rank() == 0 && !a.given_scale) a.stats[int64_t(kNoiseScale) * a.groups + group] = scale;
  }
}

// --- backward ---

// Chunks of a group in registers, three numbers an element; the sums of gradients by element leave registers for half.
template <class T, bool kElementwise = false>
constexpr int kBackwardRegister = (kElementwise ? 8 : 16) / kChunkOf<T>;

// g times the weight, where it varies within the group; else finish_gradient() multiplies by it.
template <class T, bool kRagged, class Real>
__device__ __forceinline__ void weighted_gradient(const KernelArgs<Real>& a, const GroupPlace& place, const ChunkPlace& c,
                                                  const Real (&g)[kChunkOf<T>], Real (&weighted)[kChunkOf<T>]) {
  constexpr int N = kChunkOf<T>;
  if (a.affine == Affine::kPerElement && a.weight) {
    element_parameters<T, kRagged>(a.weight, a.weight_in_storage, c, weighted);
#pragma unroll
    for (int j = 0; j < N; ++j) weighted[j] *= g[j];
  } else {
    const Real weight = a.affine == Affine::kPerRun ? run_affine<T>(a, place.inner * a.runs + c.run).weight : Real(1);
#pragma unroll
    for (int j = 0; j < N; ++j) weighted[j] = a.affine == Affine::kPerRun ? g[j] * weight : g[j];
  }
}

template <class T, bool kRagged, bool kElementwise, bool kFused, int kRegister = kBackwardRegister<T, kElementwise>>
class BackwardGroup {
  static constexpr int N = kChunkOf<T>;
  using At = ChunkAt<T, kRagged>;
  using Real = RealOf<T>;
  using Threads = BlockThreads<Real>;
  using Chunk = Real (&)[3][N];  // G psi_h, w, h

 public:
  static constexpr int kSums = kElementwise ? 5 : kGradientSums;

  __device__ BackwardGroup(const KernelArgs<Real>& a, Threads& threads)
      : a_(a), threads_(threads), cache_(a.chunks, threads.rank(), threads.size()) {
    if constexpr (kElementwise) {
      const uint32_t first = first_element_sum();
      for (uint32_t i = 0; i < cache_.count() * kSumFours; ++i) element_sum(first + i * blockDim.x) = {};
    }
  }

  __device__ __forceinline__ void reduce(const GroupPlace& place, const GroupConstants<Real>& constants,
                                         Real (&sums)[kSums]) {
    const bool noisy = a_.noise && a_.weight_partials != nullptr;
    // in the unit of x, that of the logarithms
    const Real noise = a_.noise_train * constants.noise_scale * (kNormalUnit<Real> / DeviceLog<Real>::kUnit);
    const PhiloxSchedule keys(noisy ? uint64_t(*a_.seed) : 0);
    uint32_t of_chunk = kElementwise ? first_element_sum() : 0;
    with_path(constants.path, [&](auto tag) {
      using Raw = GradientFetch<T, kFused, false, kRagged || tag.value != PrecisionPath::kPlain, InRegisters>;
      using InSlot = GradientFetch<T, kFused, false, kRagged, InShared>;
      const auto load = [&](uint32_t chunk, auto& raw) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
        fetch<T, kRagged>(a_.input, place.input, a_.at_input, c, raw.u);
        fetch<T, kRagged>(a_.grad, place.grad, a_.at_grad, c, raw.g);
        fetch_mask<kFused>(At{place, c}, a_.fused.activated, raw.activated);
      };
      cache_.template fill<Raw, InSlot>(load, [&](Chunk kept, uint32_t chunk, uint32_t, const auto& raw) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
        Real g[N], x[N];
        values<T, kRagged>(a_.input, place.input, a_.at_input, c, raw.u, kept[2]);
        values<T, kRagged>(a_.grad, place.grad, a_.at_grad, c, raw.g, g);
        mask_gradient<kFused>(At{place, c}, a_.fused, raw.activated, g);
        weighted_gradient<T, kRagged>(a_, place, c, g, kept[0]);
        slopes<tag.value>(c.span, constants, kept, x, sums);
        if constexpr (kElementwise) {
          if (noisy) add_noise<kRagged>(a_, place, c, keys, noise, x);
          add_element_sums(of_chunk, g, x);
          of_chunk += kSumFours * blockDim.x;
        } else {
#pragma unroll
          for (int j = 0; j < N; ++j) sums[5] += g[j], sums[6] += g[j] * x[j];
          if (noisy) sums[6] += noise * noise_product<kRagged>(a_, place, c, keys, g);
        }
      });
    });
    natural_sums(sums);
    threads_.sum(sums);
  }

  __device__ __forceinline__ void write(const GroupPlace& place, const InputGradient<Real>& du) {
    using SumGradient = FusedFetch<T, kFused, kRagged>;
    const auto load = [&](uint32_t chunk, SumGradient& raw) {
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
      fetch_fused<kFused>(At{place, c}, a_.fused.grad_sum, raw);
    };
    cache_.template each_with<SumGradient>(load, [&](Chunk kept, uint32_t chunk, uint32_t, const SumGradient& grad_sum) {
      Real out[N];
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] = du(kept[0][j], kept[1][j], kept[2][j]);
      const ChunkPlace c = locate_chunk<kRagged, N>(a_, place, chunk);
      add_sum_gradient<kFused>(At{place, c}, a_.fused, grad_sum, out);
      write_chunk<T, kRagged>(a_.output, place.output, a_.at_output, c, out);
    });
  }

  // This thread group's partial gradients of parameters that vary by element.
  __device__ __forceinline__ void write_element_sums() const {
    if constexpr (kElementwise) {
      uint32_t of_chunk = first_element_sum();
#pragma unroll 1
      for (uint32_t i = 0; i < cache_.count(); ++i, of_chunk += kSumFours * blockDim.x) {
        const ChunkPlace c = locate_chunk<kRagged, N>(a_, GroupPlace(), threads_.rank() + i * threads_.size());
        const int64_t at = threads_.index() * a_.length + c.first;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const Four<Real>& weight = element_sum(of_chunk + j / 4 * blockDim.x);
          const Four<Real>& bias = element_sum(of_chunk + (N + j) / 4 * blockDim.x);
          if (a_.weight_partials) a_.weight_partials[at + j] = weight.v[j % 4] * DeviceLog<Real>::kUnit;
          if (a_.bias_partials) a_.bias_partials[at + j] = bias.v[j % 4];
        }
      }
    }
  }

 private:
  // From (G, -, u) to (G psi_h, w, h), with x in the unit of the logarithms; elements outside the run become zeros.
  template <PrecisionPath kPath>
  __device__ __forceinline__ void slopes(Span span, const GroupConstants<Real>& constants, Chunk kept, Real (&x)[N],
                                         Real (&sums)[kSums]) {
    const SignedExponent<Real> exponent = gradient_exponent(constants.exponents);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (!kRagged || span.has(j)) {
        kept[2][j] = constants.standardize(kept[2][j]);
        const Slopes<Real> s =
            gradient_round(kPath, kept[2][j], kept[0][j], exponent, constants.exponents, constants.lmbda, sums);
        kept[0][j] = s.through_h, kept[1][j] = s.w, x[j] = s.x;
      } else {
        kept[0][j] = kept[1][j] = kept[2][j] = x[j] = Real(0);
      }
    }
  }

  // Sums of all groups for the gradients of the parameters, of the weight and then of the bias, for each of this thread's
  // chunks, behind the chunks in shared memory: in registers they would halve the threads that run at the same time.
  static constexpr uint32_t kSumFours = 2 * N / 4;
  __device__ __forceinline__ uint32_t first_element_sum() const {
    return a_.shared_chunks * (3 * N / 4) * blockDim.x + threadIdx.x;
  }
  static __device__ __forceinline__ Four<Real>& element_sum(uint32_t at) {
    NN_DYNAMIC_SHARED(raw);
    return reinterpret_cast<Four<Real>*>(raw)[at];
  }
  static __device__ __forceinline__ void add_element_sums(uint32_t at, const Real (&g)[N], const Real (&x)[N]) {
#pragma unroll
    for (int q = 0; q < N / 4; ++q) {
      Four<Real>&weight = element_sum(at + q * blockDim.x), &bias = element_sum(at + (N / 4 + q) * blockDim.x);
      Four<Real> sum = weight;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.v[j] += g[4 * q + j] * x[4 * q + j];
      weight = sum;
      sum = bias;
#pragma unroll
      for (int j = 0; j < 4; ++j) sum.v[j] += g[4 * q + j];
      bias = sum;
    }
  }

  const KernelArgs<Real>& a_;
  Threads& threads_;
  TileCache<Real, N, kRegister, 3, kFused> cache_;
};

template <class T, bool kRagged, bool kElementwise, bool kFused>
__global__ void __launch_bounds__(kFused ? kFusedBackwardBlock : kBackwardBlock, 1)
rows_backward(const KernelArgs<RealOf<T>> a, typename BlockThreads<RealOf<T>>::Sync sync) {
  using Real = RealOf<T>;
  BlockThreads<Real> threads(sync);
  using Pass = BackwardGroup<T, kRagged, kElementwise, kFused>;
  Pass pass(a, threads);
  // A lane loads one statistic of a group, before it writes the gradient of the group before.
  const auto load_statistic = [&](uint32_t group) {
    const uint32_t lane = threads.rank() % 32;
    return group < a.groups && lane < kStatRows ? a.stats[int64_t(lane) * a.groups + group] : Real(0);
  };
  Real statistic = load_statistic(threads.index());
#pragma unroll 1
  for (uint32_t group = threads.index(); group < a.groups; group += threads.count()) {
    prefetch_group<T, true>(a, threads, group + threads.count());  // here it takes no register from what follows
    const GroupPlace place = locate_group(a, group);
    const auto row = [&](StatRow r) { return __shfl_sync(kAllLanes, statistic, int(r)); };
    const GroupConstants<Real> constants = group_constants(row, a.settings, a.frozen);
    Real sums[Pass::kSums] = {};
    pass.reduce(place, constants, sums);
    statistic = load_statistic(group + threads.count());
    if constexpr (!kElementwise) {
      if (threads.rank() == 0 && a.affine == Affine::kPerGroup) {
        if (a.bias_partials) a.bias_partials[group] = sums[5];
        if (a.weight_partials) a.weight_partials[group] = sums[6];
      }
    }
    if (a.output) {
      const Real weight = group_affine<T>(a, place).weight;
      pass.write(locate_group(a, opaque(group)),
                 finish_gradient(sums, weight, a.inverse_count, constants.rstd, a.frozen));
    }
  }
  pass.write_element_sums();
}

}  // namespace
}  // namespace cuda
}  // namespace normnorm
