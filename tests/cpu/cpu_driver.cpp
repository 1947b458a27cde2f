// csrc/cpu without torch, for the sanitizers: passes of every kind over tensors in heap memory of exactly their size, on
// plain threads. Prints a line of checksums per case, which must not depend on the number of threads, the only argument.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "../../csrc/cpu/params.h"

using namespace normnorm;
using namespace normnorm::cpu;

namespace {

int g_threads = 1;

void run_on_threads(int64_t count, RangeBody body, void* context) {
  std::vector<std::thread> threads;
  const int64_t part = (count + g_threads - 1) / g_threads;
  for (int64_t begin = 0; begin < count; begin += part)
    threads.emplace_back(body, context, begin, begin + part < count ? begin + part : count);
  for (auto& t : threads) t.join();
}

struct Case {
  const char* name;
  Storage storage;
  Geometry geometry;
  Affine affine;
  Strides stride;
  int64_t parameters;
};

std::vector<char> tensor(Storage s, int64_t count, int salt) {
  const size_t item = s == Storage::kFloat64 ? 8 : s == Storage::kFloat32 ? 4 : 2;
  std::vector<char> data(size_t(count) * item);
  for (int64_t i = 0; i < count; ++i) {
    const float f = std::sin(0.7f * float(i % 9973) + float(salt)) * (i % 5 ? 1.0f : 3.0f);
    const double d = f;
    // Of either sign, from 1/2 to 2.
    const int step = int((i % 9973 * 37 + salt) % 256), sign = i % 3 ? 0 : 0x8000;
    const uint16_t h = uint16_t(sign | (s == Storage::kBFloat16 ? 0x3f00 + step : 0x3800 + 8 * step));
    const void* value = item == 8 ? static_cast<const void*>(&d) : item == 4 ? static_cast<const void*>(&f) : &h;
    __builtin_memcpy(data.data() + size_t(i) * item, value, item);
  }
  return data;
}

double checksum(const std::vector<char>& data) {
  uint64_t sum = 14695981039346656037ull;
  for (char c : data) sum = (sum ^ uint8_t(c)) * 1099511628211ull;
  return double(sum >> 11);
}

void run(const Case& w, bool noisy, bool frozen) {
  const Geometry& g = w.geometry;
  const int64_t count = g.groups() * g.group_size();
  const size_t real = w.storage == Storage::kFloat64 ? 8 : 4;
  auto input = tensor(w.storage, count, 1), grad = tensor(w.storage, count, 2);
  std::vector<char> output(input.size()), grad_input(input.size()), stats(8 * size_t(g.groups()) * real);
  const Storage wide = real == 8 ? Storage::kFloat64 : Storage::kFloat32;
  auto weight = tensor(wide, w.parameters, 3), bias = tensor(wide, w.parameters, 4);
  std::vector<char> grad_weight(weight.size()), grad_bias(bias.size());
  if (frozen) stats = tensor(wide, 8 * g.groups(), 5);

  Problem p;
  p.storage = w.storage;
  p.geometry = g;
  p.affine = w.affine;
  p.pool = {g_threads, run_on_threads};
  p.frozen = frozen;
  p.noise.on = noisy;
  p.noise.train = 0.4;
  p.seed = 42;
  p.noise.position = w.stride;
  p.stats = stats.data();
  p.weight = weight.data(), p.bias = bias.data();
  p.input = {input.data(), w.stride};
  p.output = {output.data(), w.stride};
  kernels().forward(p);
  p.grad_output = {grad.data(), w.stride};
  p.output = {grad_input.data(), w.stride};
  p.grad_weight = grad_weight.data(), p.grad_bias = grad_bias.data();
  kernels().backward(p);
  std::printf("%s %d%d %.0f %.0f %.0f %.0f %.0f\n", w.name, noisy, frozen, checksum(output), checksum(stats),
              checksum(grad_input), checksum(grad_weight), checksum(grad_bias));
}

// A pass over a batch round by round, each with the statistics of the whole pass.
void run_rounds(const Case& w) {
  const Geometry& g = w.geometry;
  const int64_t count = g.groups() * g.group_size();
  const Storage wide = w.storage == Storage::kFloat64 ? w.storage : Storage::kFloat32;
  auto input = tensor(w.storage, count, 1), grad = tensor(w.storage, count, 2);
  auto stats = tensor(wide, 8 * g.groups(), 5), weight = tensor(wide, w.parameters, 3);
  std::vector<char> result(input.size());

  Problem p;
  p.storage = w.storage;
  p.geometry = g;
  p.affine = w.affine;
  p.pool = {g_threads, run_on_threads};
  p.noise.on = true;
  p.noise.train = 0.4;
  p.noise.position = w.stride;
  p.stats = stats.data();
  p.weight = weight.data();
  p.input = {input.data(), w.stride};
  p.output = {result.data(), w.stride};
  p.grad_output = {grad.data(), w.stride};
  for (int number = 1; number <= int(Round::kGradient); ++number) {
    p.round = Round(number);
    std::vector<char> sums = tensor(Storage::kFloat64, kRoundSums[number] * g.groups(), 6);
    p.sums = reinterpret_cast<double*>(sums.data());
    (p.round < Round::kSums ? kernels().forward : kernels().backward)(p);
    std::printf("%s round %d %.0f %.0f\n", w.name, number, checksum(result), checksum(sums));
  }
}

void run_projected(Storage storage, int64_t count, bool slopes) {
  auto projections = tensor(storage, count, 6);
  const double sum =
      kernels().projected_error({storage, projections.data(), count, slopes, {g_threads, run_on_threads}});
  std::printf("projected %d%d %.17g %.0f\n", int(storage), slopes, sum, checksum(projections));
}

}  // namespace

int main(int argc, char** argv) {
  g_threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const auto f32 = Storage::kFloat32;
  const Case cases[] = {
      {"batch", f32, {false, 1, 3, 4, 49}, Affine::kPerGroup, {0, 49, 147}, 3},
      {"batch-long", f32, {false, 1, 2, 3, 5001}, Affine::kPerGroup, {0, 5001, 10002}, 2},
      {"batch-bf16", Storage::kBFloat16, {false, 1, 3, 2, 701}, Affine::kPerGroup, {0, 701, 2103}, 3},
      {"batch-f64", Storage::kFloat64, {false, 1, 3, 4, 33}, Affine::kPerGroup, {0, 33, 99}, 3},
      {"layer", f32, {false, 1, 37, 1, 50}, Affine::kPerElement, {0, 50, 0}, 50},
      {"layer-long", f32, {false, 1, 2, 1, 9001}, Affine::kPerElement, {0, 9001, 0}, 9001},
      {"layer-f16", Storage::kFloat16, {false, 1, 5, 1, 333}, Affine::kPerElement, {0, 333, 0}, 333},
      {"group", f32, {false, 2, 2, 3, 65}, Affine::kPerRun, {390, 195, 65}, 6},
      {"instance", f32, {false, 3, 2, 1, 129}, Affine::kPerGroup, {258, 129, 129}, 2},
      {"columns", f32, {true, 1, 21, 3000, 1}, Affine::kPerColumn, {0, 1, 21}, 21},
      {"columns-bf16", Storage::kBFloat16, {true, 1, 35, 300, 1}, Affine::kPerColumn, {0, 1, 35}, 35},
      {"columns-f64", Storage::kFloat64, {true, 1, 5, 70, 1}, Affine::kPerColumn, {0, 1, 5}, 5},
      {"columns-wide", f32, {true, 1, 4100, 3, 1}, Affine::kPerColumn, {0, 1, 4100}, 4100},
      {"columns-groups", f32, {true, 3, 2, 50, 9}, Affine::kPerColumn, {900, 9, 18}, 18},
  };
  for (const Case& w : cases) {
    run(w, true, false);
    run(w, false, false);
    if (w.affine == Affine::kPerGroup || w.affine == Affine::kPerColumn) run(w, false, true);
    if (w.geometry.outer == 1 && w.affine != Affine::kPerElement) run_rounds(w);
  }
  for (const Storage s : {Storage::kFloat32, Storage::kFloat64})
    for (const int64_t count : {0, 3, 777, 40001}) {
      run_projected(s, count, true);
      run_projected(s, count, false);
    }
  return 0;
}
