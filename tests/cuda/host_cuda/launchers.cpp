// The launchers of csrc/cuda for ctypes, with a plan of the caller's choice: three arrays in place of a Problem, whose
// elements harness.arrays() puts in this order.
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <string>

#include "../../../csrc/cuda/launch.h"

using namespace normnorm;
using namespace normnorm::cuda;

#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

std::string message;

// Returns what f returns, a CUDA error; -1 and the message of an exception, which kernels on the CPU raise.
template <class F>
int guarded(F f) {
  try {
    return f();
  } catch (const std::exception& e) {
    message = e.what();
    return -1;
  }
}

// Returns the elements of an array in turn.
template <class T>
class Next {
 public:
  explicit Next(const T* values) : values_(values) {}
  T operator()() { return *values_++; }

 private:
  const T* values_;
};

Strides strides(Next<int64_t>& number) {
  const int64_t outer = number(), inner = number();
  return {outer, inner, number()};
}

Problem problem_of(const int64_t* numbers, const double* reals, void* const* pointers) {
  Next<int64_t> number(numbers);
  Next<double> real(reals);
  Next<void*> pointer(pointers);
  Problem p;
  p.storage = normnorm::Storage(number());
  const bool columns = number() != 0;
  const int64_t outer = number(), inner = number(), runs = number();
  p.geometry = {columns, outer, inner, runs, number()};
  p.affine = Affine(number());
  p.noise.on = number() != 0;
  p.noise.given_scale = number() != 0;
  p.noise.stream = uint32_t(number());
  p.noise.position = strides(number);
  p.order = int(number());
  p.frozen = number() != 0;
  for (Parameter* each : {&p.weight, &p.bias, &p.grad_weight, &p.grad_bias}) *each = {pointer(), number() != 0};
  for (Operand* each : {&p.input, &p.output, &p.grad_output, &p.residual, &p.activated, &p.addend, &p.sum, &p.grad_sum}) {
    void* data = pointer();
    *each = {data, strides(number)};
  }
  p.relu = number() != 0;
  p.force.tier = Tier(number());
  p.force.threads = int(number());
  p.force.blocks = int(number());
  p.force.thread_groups = int(number());
  p.noise.train = real();
  p.eps = real();
  p.alpha = real();
  p.transform_eps = real();
  p.seed = static_cast<const int64_t*>(pointer());
  p.stats = pointer();
  p.workspace = pointer();
  return p;
}

}  // namespace

EXPORT const char* launcher_message() { return message.c_str(); }

EXPORT int launcher_workspace(const int64_t* numbers, const double* reals, void* const* pointers, int backward,
                              size_t* bytes) {
  const Problem p = problem_of(numbers, reals, pointers);
  return normnorm_cuda_workspace(&p, backward, bytes);
}

EXPORT int launcher_run(const int64_t* numbers, const double* reals, void* const* pointers, int backward, void* stream) {
  const Problem p = problem_of(numbers, reals, pointers);
  return guarded([&] { return backward ? normnorm_cuda_backward(&p, stream) : normnorm_cuda_forward(&p, stream); });
}

// As normnorm_cuda_plan().
EXPORT int launcher_plan(const int64_t* numbers, const double* reals, void* const* pointers, int backward, int plan[5]) {
  const Problem p = problem_of(numbers, reals, pointers);
  return normnorm_cuda_plan(&p, backward, plan);
}

// The refusal of the problem's geometry, or null.
EXPORT const char* launcher_refusal(const int64_t* numbers, const double* reals, void* const* pointers) {
  const Problem p = problem_of(numbers, reals, pointers);
  return normnorm_cuda_refusal(&p);
}
