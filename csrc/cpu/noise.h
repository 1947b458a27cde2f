// Standard normals for runs of elements: Philox, then Box-Muller, both vectorised.
#pragma once

#include "../common/params.h"
#include "../math/normals.h"
#include "../math/philox.h"
#include "simd.h"

namespace normnorm {
namespace {

// The canonical index of an element of a transposed order: `position` is the index of (a, i, j) in shape
// (A, rows, cols), the result that of (a, j, i) in shape (A, cols, rows).
NN_HD uint64_t transposed_index(const NoiseOrder& order, int64_t position) {
  const int64_t slab = order.rows * order.cols, rest = position % slab;
  return uint64_t(position - rest + rest % order.cols * order.rows + rest / order.cols);
}

struct NoiseSource {
  uint64_t seed = 0;
  uint32_t stream = 0;
  NoiseOrder order;
};

// Products of the 32-bit words in the lower halves of 64-bit lanes with b.
NN_HD VUInt64 multiply_words(VUInt64 a, uint32_t b) {
#if defined(__AVX512F__)
  return (VUInt64)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (VUInt64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__x86_64__)
  return (VUInt64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * uint64_t(b);
#endif
}

// The four words of each counter, in the lower halves of 64-bit lanes; the upper halves are not used.
struct PhiloxLanes {
  VUInt64 c0, c1, c2, c3;
};

// The keys of all rounds.
struct LaneKeys {
  uint64_t key0[kPhiloxRounds], key1[kPhiloxRounds];

  NN_HD explicit LaneKeys(uint64_t seed) {
    for (uint32_t round = 0; round < kPhiloxRounds; ++round) {
      key0[round] = uint32_t(uint32_t(seed) + round * kPhiloxWeyl0);
      key1[round] = uint32_t(uint32_t(seed >> 32) + round * kPhiloxWeyl1);
    }
  }
};

// The counters to compute: first, first + 1, ... or those of a list, which must be readable to the end of a batch.
struct Counters {
  uint64_t first = 0;
  const uint64_t* list = nullptr;

  uint64_t operator[](int64_t i) const { return list ? list[i] : first + uint64_t(i); }
  NN_HD VUInt64 lanes(int64_t i) const {
    VUInt64 v;
    if (list) {
      memcpy(&v, list + i, sizeof(v));
      return v;
    }
    for (int lane = 0; lane < kLanes<VDouble>; ++lane) v[lane] = uint64_t(lane);
    return v + (first + uint64_t(i));
  }
};

constexpr int kBatchCounters = kLanes<VDouble>;  // counters of a batch, one in each lane of a vector
constexpr int kNoiseBatch = 8 * kBatchCounters;  // normals of a batch
constexpr int kWordBatches = 4;  // batches whose words are computed together, to overlap their dependency chains

// The words of kBatches batches from counter number i on.
template <int kBatches>
NN_HD void philox_lanes(PhiloxLanes (&state)[kBatches], const Counters& counters, int64_t i, const LaneKeys& keys,
                        uint32_t stream) {
  for (int k = 0; k < kBatches; ++k) {
    const VUInt64 counter = counters.lanes(i + k * kBatchCounters);
    state[k] = {counter, counter >> 32, VUInt64{} + uint64_t(stream), VUInt64{}};
  }
#pragma GCC unroll 7  // without it a fifth of the instructions are moves between registers
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (PhiloxLanes& s : state) {
      const VUInt64 p0 = multiply_words(s.c0, kPhiloxM0), p1 = multiply_words(s.c2, kPhiloxM1);
      s = {(p1 >> 32) ^ s.c1 ^ keys.key0[round], p1, (p0 >> 32) ^ s.c3 ^ keys.key1[round], p0};
    }
  }
}

// The half of a counter that a 32-bit lane of a batch's vectors holds. A half gives four normals; halves 2c and 2c + 1
// belong to the batch's counter c. With this order of the lanes, normal_batch() gets the normals in the order of the
// elements by transposing 4 x 4 blocks within 128 bits, which is cheap.
NN_HD constexpr int half_of_lane(int lane) { return lane % 4 * (kLanes<VFloat> / 4) + lane / 4; }

// A vector of 32-bit lanes, in that order, of words `a` for the first halves and `b` for the second halves.
NN_HD VUInt32 words_of_halves(VUInt64 a, VUInt64 b) {
  const VUInt32 x = (VUInt32)a, y = (VUInt32)b;
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 4, 8, 12, 16, 20, 24, 28, 2, 6, 10, 14, 18, 22, 26, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(x, y, 0, 4, 2, 6);
#endif
}

// Interleaves a and b within every 128 bits: a0 b0 a1 b1 from the lower halves, a2 b2 a3 b3 from the upper halves.
NN_HD VFloat zip_low(VFloat a, VFloat b) {
#if defined(__AVX512F__)
  return _mm512_unpacklo_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_unpacklo_ps(a, b);
#else
  return __builtin_shufflevector(a, b, 0, 4, 1, 5);
#endif
}
NN_HD VFloat zip_high(VFloat a, VFloat b) {
#if defined(__AVX512F__)
  return _mm512_unpackhi_ps(a, b);
#elif defined(__AVX2__)
  return _mm256_unpackhi_ps(a, b);
#else
  return __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// A buffer is filled by three loops over the same memory: words, radii, normals. The dependency chain of each is short
// enough for the processor to overlap iterations; a single loop would take twice the time.

NN_HD void store_words(float* z, VUInt32 words) { store_dense<VFloat>(z, bit_cast<VFloat>(words)); }
NN_HD VUInt32 load_words(const float* z) { return bit_cast<VUInt32>(load_dense<VFloat>(z)); }

// Writes four vectors for each of kBatches batches: the words for the radius and for the angle of each half's first
// pair of normals, then those of its second pair.
template <int kBatches>
NN_HD void word_batches(float* z, const Counters& counters, int64_t i, const LaneKeys& keys, uint32_t stream) {
  constexpr int w = kLanes<VFloat>;
  PhiloxLanes state[kBatches];
  philox_lanes(state, counters, i, keys, stream);
  for (const PhiloxLanes& s : state) {
    const VUInt32 first = words_of_halves(s.c0, s.c2), second = words_of_halves(s.c1, s.c3),
                  next = words_of_halves(s.c2, s.c0);
    store_words(z, first);
    store_words(z + w, turn_word(first, second));
    store_words(z + 2 * w, second);
    store_words(z + 3 * w, turn_word(second, next));
    z += kNoiseBatch;
  }
}

// Replaces the words for the radius by the radii.
NN_HD void radius_batch(float* z) {
  constexpr int w = kLanes<VFloat>;
  store_dense<VFloat>(z, normal_radius<VFloat>(load_words(z)));
  store_dense<VFloat>(z + 2 * w, normal_radius<VFloat>(load_words(z + 2 * w)));
}

// Replaces radii and angles by normals, in the order of the elements.
NN_HD void normal_batch(float* z) {
  constexpr int w = kLanes<VFloat>;
  const NormalPair<VFloat> even = on_circle(load_dense<VFloat>(z), load_words(z + w)),
                           odd = on_circle(load_dense<VFloat>(z + 2 * w), load_words(z + 3 * w));
  const VFloat first = zip_low(even.first, odd.first), first_high = zip_high(even.first, odd.first);
  const VFloat second = zip_low(even.second, odd.second), second_high = zip_high(even.second, odd.second);
  store_dense<VFloat>(z, zip_low(first, second));
  store_dense<VFloat>(z + w, zip_high(first, second));
  store_dense<VFloat>(z + 2 * w, zip_low(first_high, second_high));
  store_dense<VFloat>(z + 3 * w, zip_high(first_high, second_high));
}

// Elements that a buffer needs in addition: up to 7 before the first normal, and the rest of the last batch.
constexpr int kNoiseSlack = kNoiseBatch + 8;

// The normals of `count` counters, and of those that complete the last batch.
inline void counter_normals(float* z, const Counters& counters, int64_t count, const NoiseSource& source) {
  const LaneKeys keys(source.seed);
  const int64_t batches = (count + kBatchCounters - 1) / kBatchCounters;
  int64_t b = 0;
  for (; b + kWordBatches <= batches; b += kWordBatches)
    word_batches<kWordBatches>(z + b * kNoiseBatch, counters, b * kBatchCounters, keys, source.stream);
  for (; b < batches; ++b) word_batches<1>(z + b * kNoiseBatch, counters, b * kBatchCounters, keys, source.stream);
  for (b = 0; b < batches; ++b) radius_batch(z + b * kNoiseBatch);
  for (b = 0; b < batches; ++b) normal_batch(z + b * kNoiseBatch);
}
inline void counter_normals(double* z, const Counters& counters, int64_t count, const NoiseSource& source) {
  for (int64_t i = 0; i < count; ++i) {
    const PhiloxWords w = noise_words(source.seed, source.stream, counters[i]);
    for (int j = 0; j < 4; ++j, z += 2) {
      const NormalPair<double> pair = normal_pair_double(w.word[j], w.word[(j + 1) % 4]);
      z[0] = pair.first, z[1] = pair.second;
    }
  }
}

// The normal of one position. Each takes a whole counter, which is slow; used only if the input's memory format changed
// between forward and backward.
template <class T>
NN_HD T transposed_normal(int64_t position, const NoiseSource& source) {
  const uint64_t index = transposed_index(source.order, position);
  const PhiloxWords w = noise_words(source.seed, source.stream, index / 8);
  const uint32_t word = w.word[index / 2 % 4], next = w.word[(index / 2 + 1) % 4];
  if constexpr (sizeof(T) == 4) {
    const NormalPair<float> pair = on_circle(normal_radius<float>(word), turn_word(word, next));
    return index % 2 ? pair.second : pair.first;
  } else {
    const NormalPair<double> pair = normal_pair_double(word, next);
    return index % 2 ? pair.second : pair.first;
  }
}

// The normals of `count` positions from `position` on, in the order of the layout. Returns the address of the first in
// `buffer`, which has count + kNoiseSlack elements.
template <class T>
inline const T* normals(T* buffer, int64_t position, int64_t count, const NoiseSource& source) {
  if (source.order.transposed) {
    for (int64_t i = 0; i < count; ++i) buffer[i] = transposed_normal<T>(position + i, source);
    return buffer;
  }
  const int64_t skip = position % 8;
  counter_normals(buffer, {uint64_t(position) / 8}, (skip + count + 7) / 8, source);
  return buffer + skip;
}

// The normals of `runs` runs of `length` positions, whose starts are `step` apart, one run after the other in `buffer`
// of runs x length + kNoiseSlack elements. Computes only the counters needed.
template <class T>
inline void normals_of_runs(T* buffer, int64_t position, int64_t step, int64_t length, int64_t runs,
                            const NoiseSource& source) {
  using V = VectorOf<T>;
  if (source.order.transposed) {
    for (int64_t r = 0; r < runs; ++r)
      for (int64_t i = 0; i < length; ++i) *buffer++ = transposed_normal<T>(position + r * step + i, source);
    return;
  }
  constexpr int64_t most = 256;  // counters computed at a time
  uint64_t list[most + kBatchCounters] = {};
  T z[8 * most + kNoiseSlack];
  const int64_t together = most / ((length + 14) / 8);  // runs at a time; the divisor bounds a run's counters
  for (int64_t first = 0; first < runs; first += together) {
    const int64_t end = first + together < runs ? first + together : runs;
    int64_t count = 0;
    for (int64_t r = first; r < end; ++r) {
      const int64_t begin = position + r * step;
      for (int64_t c = begin / 8; c <= (begin + length - 1) / 8; ++c) list[count++] = uint64_t(c);
    }
    counter_normals(z, {0, list}, count, source);
    const T* from = z;
    for (int64_t r = first; r < end; ++r) {
      const int64_t begin = position + r * step, skip = begin % 8;
      // the next run overwrites what the last vector writes beyond `length`
      for (int64_t i = 0; i < length; i += kLanes<V>) store_dense<V>(buffer + i, load_dense<V>(from + skip + i));
      buffer += length;
      from += (skip + length + 7) / 8 * 8;
    }
  }
}

}  // namespace
}  // namespace normnorm
