// The resident kernels for one group, for counting instructions: a probe keeps kRegister chunks a thread, so that the
// difference between two probes is the cost of a chunk. On the plain precision path alone.
#include "../../../csrc/cuda/rows_resident.cuh"

using namespace normnorm;
using namespace normnorm::cuda;

namespace {

// A fused probe has all fused tensors, so that no pointer is tested.
__device__ __forceinline__ void fuse(FusedTensors& fused) {
  fused.activation = Activation::kRelu;
  for (const FusedTensor* t : {&fused.residual, &fused.addend, &fused.activated, &fused.grad_sum})
    __builtin_assume(t->data != nullptr);
}

template <class T, bool kNoise, int kRegister, bool kFused = false>
__device__ __forceinline__ void forward(KernelArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  BlockThreads<Real> threads({});
  a.affine = Affine::kPerGroup;
  a.noise = kNoise;
  if (kFused) fuse(a.fused);
  ForwardGroup<T, false, kNoise, BlockThreads<Real>, kRegister, kFused> pass(a, threads);
  const GroupPlace g = locate_group(a, threads.index());
  const Moments1<Real> m = pass.moments(g);
  const Estimate<Real> estimate = pass.estimate(g, m);
  const Exponents<Real> e = make_exponents<Real>(estimate.lmbda, a.settings);
  if constexpr (kNoise) {
    const Real mean = pass.transform(e, PrecisionPath::kPlain);
    pass.write_noisy(g, PhiloxSchedule(uint64_t(*a.seed)), a.noise_train * pass.deviation(g, mean) * kNormalUnit<Real>);
  } else {
    pass.write_plain(g, e, PrecisionPath::kPlain);
  }
}

// kGradients: 0 of the input alone, 1 of the weight too, 2 of the weight with noise.
template <class T, int kGradients, int kRegister, bool kFused = false>
__device__ __forceinline__ void backward(KernelArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  BlockThreads<Real> threads({});
  a.affine = Affine::kPerGroup;
  a.noise = kGradients == 2;
  if (kGradients == 0) a.weight_partials = nullptr;
  if (kFused) fuse(a.fused);
  BackwardGroup<T, false, false, kFused, kRegister> pass(a, threads);
  const GroupPlace place = locate_group(a, threads.index());
  GroupConstants<Real> constants =
      load_constants(a.stats, threads.index(), a.groups, a.settings, false);
  constants.path = PrecisionPath::kPlain;
  Real sums[kGradientSums] = {};
  pass.reduce(place, constants, sums);
  pass.write(place, finish_gradient(sums, group_affine<T>(a, place).weight, a.inverse_count, constants.rstd, false));
  if (kGradients > 0 && threadIdx.x == 0) a.weight_partials[threads.index()] = sums[6], a.bias_partials[threads.index()] = sums[5];
}

}  // namespace

#define PROBE(name, T, call) \
  extern "C" __global__ void __launch_bounds__(128) name(const KernelArgs<RealOf<T>> a) { call(a); }
// A thread of "many" has 32 elements more than one of "few" forward, 16 backward: PROBE_ELEMENTS of sass.py.
#define PROBES(type, T, per_8)                                           \
  PROBE(forward_##type##_few, T, (forward<T, false, per_8>))             \
  PROBE(forward_##type##_many, T, (forward<T, false, 5 * per_8>))        \
  PROBE(forward_noise_##type##_few, T, (forward<T, true, per_8>))        \
  PROBE(forward_noise_##type##_many, T, (forward<T, true, 5 * per_8>))   \
  PROBE(backward_##type##_few, T, (backward<T, 0, 2 * per_8>))           \
  PROBE(backward_##type##_many, T, (backward<T, 0, 4 * per_8>))          \
  PROBE(backward_weight_##type##_few, T, (backward<T, 1, 2 * per_8>))    \
  PROBE(backward_weight_##type##_many, T, (backward<T, 1, 4 * per_8>))   \
  PROBE(backward_noise_##type##_few, T, (backward<T, 2, 2 * per_8>))     \
  PROBE(backward_noise_##type##_many, T, (backward<T, 2, 4 * per_8>))    \
  PROBE(forward_fused_##type##_few, T, (forward<T, true, per_8, true>)) \
  PROBE(forward_fused_##type##_many, T, (forward<T, true, 5 * per_8, true>)) \
  PROBE(backward_fused_##type##_few, T, (backward<T, 1, 2 * per_8, true>)) \
  PROBE(backward_fused_##type##_many, T, (backward<T, 1, 4 * per_8, true>))

PROBES(float32, float, 2)
PROBES(bfloat16, __nv_bfloat16, 1)
PROBES(float16, __half, 1)
