// One group's way through the resident kernels, for counting instructions: each probe holds kRegister chunks a thread,
// so that the difference between two of them is what a chunk costs. Groups with small exponents are left
// out, as they are of the hot path.
#include "../../../csrc/cuda/rows_backward.cuh"
#include "../../../csrc/cuda/rows_forward.cuh"

using namespace normnorm;
using namespace normnorm::cuda;

namespace {

// What a joined probe reads besides is there, so that nothing is asked.
__device__ __forceinline__ void join(Joined& joined) {
  joined.relu = true;
  for (const JoinedTensor* t : {&joined.residual, &joined.addend, &joined.activated, &joined.grad_sum})
    __builtin_assume(t->data != nullptr);
}

template <class T, bool kNoise, int kRegister, bool kJoined = false>
__device__ __forceinline__ void forward(RowsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  BlockTeam<Real> team({});
  a.affine = Affine::kPerGroup;
  a.noise = kNoise;
  if (kJoined) join(a.joined);
  ForwardGroup<T, false, kNoise, BlockTeam<Real>, kRegister, kJoined> pass(a, team);
  const GroupPlace g = locate_group(a, team.index());
  const Moments1<Real> m = pass.moments(g);
  const Estimate<Real> estimate = pass.estimate(g, m);
  const Exponents<Real> e = make_exponents<Real>(estimate.lmbda, a.transform_eps);
  if constexpr (kNoise) {
    const Real mean = pass.transform(e, PrecisionPath::kPlain);
    pass.write_noisy(g, uint64_t(*a.seed), a.noise_train * pass.deviation(g, mean) * kNormalUnit<Real>);
  } else {
    pass.write_plain(g, e, PrecisionPath::kPlain);
  }
}

// kGradients: 0 of the input alone, 1 of the weight too, 2 of the weight with noise.
template <class T, int kGradients, int kRegister, bool kJoined = false>
__device__ __forceinline__ void backward(RowsArgs<RealOf<T>> a) {
  using Real = RealOf<T>;
  BlockTeam<Real> team({});
  a.affine = Affine::kPerGroup;
  a.noise = kGradients == 2;
  if (kGradients == 0) a.weight_part = nullptr;
  if (kJoined) join(a.joined);
  BackwardGroup<T, false, false, BlockTeam<Real>, kRegister, kJoined> pass(a, team);
  const GroupPlace place = locate_group(a, team.index());
  GroupConstants<Real> constants =
      load_constants(a.stats, team.index(), a.groups, a.alpha, a.order, a.transform_eps, false);
  constants.path = PrecisionPath::kPlain;
  Real sums[kGradientSums] = {};
  pass.reduce(place, constants, sums);
  pass.write(place, finish_gradient(sums, group_affine<T>(a, place).weight, a.inverse_count, constants.rstd, false));
  if (kGradients > 0 && threadIdx.x == 0) a.weight_part[team.index()] = sums[6], a.bias_part[team.index()] = sums[5];
}

}  // namespace

#define PROBE(name, T, call) \
  extern "C" __global__ void __launch_bounds__(128) name(const RowsArgs<RealOf<T>> a) { call(a); }
// sass.py knows by how many elements a thread "many" exceeds "few": 32 forward, 16 backward.
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
  PROBE(forward_joined_##type##_few, T, (forward<T, true, per_8, true>)) \
  PROBE(forward_joined_##type##_many, T, (forward<T, true, 5 * per_8, true>)) \
  PROBE(backward_joined_##type##_few, T, (backward<T, 1, 2 * per_8, true>)) \
  PROBE(backward_joined_##type##_many, T, (backward<T, 1, 4 * per_8, true>))

PROBES(float32, float, 2)
PROBES(bfloat16, __nv_bfloat16, 1)
PROBES(float16, __half, 1)
