// Standard normals for a run of elements: Philox, then Box-Muller, both vectorised.
#pragma once

#include "../common/params.h"
#include "../math/normals.h"
#include "../math/philox.h"
#include "simd.h"

namespace normnorm {
namespace {

// The index in the canonical order of element `position` of a transposed order: from (a, i, j) in an array of shape
// (A, rows, cols) to (a, j, i).
NN_HD uint64_t transposed_index(const NoiseOrder& order, int64_t position) {
  const int64_t slab = order.rows * order.cols, rest = position % slab;
  return uint64_t(position - rest + rest % order.cols * order.rows + rest / order.cols);
}

struct NoiseSource {
  uint64_t seed = 0;
  uint32_t stream = 0;
  NoiseOrder order;
};

// Products of 32-bit words, in 64-bit lanes; the upper halves of `a` are ignored.
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

// The four words of a counter, in 64-bit lanes; the upper halves have no meaning.
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

constexpr int kNoiseBatch = 4 * kLanes<VFloat>;  // normals computed together
constexpr int kWordBatches = 2;                  // batches whose words are computed together, to overlap their chains

// The quad of a batch that a lane computes. Transposing 4 x 4 blocks within 128 bits, which is cheap, then leaves the
// quads in order.
NN_HD constexpr int quad_of_lane(int lane) { return lane % 4 * (kLanes<VFloat> / 4) + lane / 4; }

// The words of kWordBatches batches from first_quad on; each element of `state` has the quads of half a batch.
constexpr int kPhiloxStates = 2 * kWordBatches;
NN_HD void philox_lanes(PhiloxLanes (&state)[kPhiloxStates], uint64_t first_quad, const LaneKeys& keys,
                        uint32_t stream) {
  constexpr int half = kLanes<VDouble>;
  for (int k = 0; k < kPhiloxStates; ++k) {
    VUInt64 place;
    for (int i = 0; i < half; ++i) place[i] = uint64_t(quad_of_lane(k % 2 * half + i));
    const VUInt64 quad = place + (first_quad + uint64_t(k / 2) * kLanes<VFloat>);
    state[k] = {quad, quad >> 32, VUInt64{} + uint64_t(stream), VUInt64{}};
  }
#pragma GCC unroll 10  // otherwise a fifth of the instructions would be moves between registers
  for (int round = 0; round < kPhiloxRounds; ++round) {
    for (PhiloxLanes& s : state) {
      const VUInt64 p0 = multiply_words(s.c0, kPhiloxM0), p1 = multiply_words(s.c2, kPhiloxM1);
      s = {(p1 >> 32) ^ s.c1 ^ keys.key0[round], p1, (p0 >> 32) ^ s.c3 ^ keys.key1[round], p0};
    }
  }
}

// The low halves of a and then b: 64-bit lanes to twice as many 32-bit lanes.
NN_HD VUInt32 low_halves(VUInt64 a, VUInt64 b) {
  const VUInt32 x = (VUInt32)a, y = (VUInt32)b;
#if defined(__AVX512F__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
#elif defined(__AVX2__)
  return __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
#else
  return __builtin_shufflevector(x, y, 0, 2, 4, 6);
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

// A buffer is filled in three loops over the same memory: words, radii, normals. The dependent chain of each is short
// enough for the processor to overlap iterations; one loop over all of it would take twice the time.

NN_HD void store_words(float* z, VUInt32 words) { store_dense<VFloat>(z, bit_cast<VFloat>(words)); }
NN_HD VUInt32 load_words(const float* z) { return bit_cast<VUInt32>(load_dense<VFloat>(z)); }

// For each of kWordBatches batches, a vector of the quads' words 0, one of their words 1, and so on.
NN_HD void word_batches(float* z, uint64_t first_quad, const LaneKeys& keys, uint32_t stream) {
  constexpr int w = kLanes<VFloat>;
  PhiloxLanes state[kPhiloxStates];
  philox_lanes(state, first_quad, keys, stream);
  for (int k = 0; k < kWordBatches; ++k, z += kNoiseBatch) {
    const PhiloxLanes &a = state[2 * k], &b = state[2 * k + 1];
    store_words(z, low_halves(a.c0, b.c0));
    store_words(z + w, low_halves(a.c1, b.c1));
    store_words(z + 2 * w, low_halves(a.c2, b.c2));
    store_words(z + 3 * w, low_halves(a.c3, b.c3));
  }
}

NN_HD void radius_batch(float* z) {
  constexpr int w = kLanes<VFloat>;
  store_dense<VFloat>(z, box_muller_radius<VFloat>(load_words(z)));
  store_dense<VFloat>(z + 2 * w, box_muller_radius<VFloat>(load_words(z + 2 * w)));
}

// Normals from radii and angles; the four of a quad become neighbours.
NN_HD void normal_batch(float* z) {
  constexpr int w = kLanes<VFloat>;
  const SinCos<VFloat> even = sincos_turn<VFloat>(load_words(z + w)),
                       odd = sincos_turn<VFloat>(load_words(z + 3 * w));
  const VFloat even_radius = load_dense<VFloat>(z), odd_radius = load_dense<VFloat>(z + 2 * w);
  const VFloat first = even_radius * even.cos, second = even_radius * even.sin;
  const VFloat third = odd_radius * odd.cos, fourth = odd_radius * odd.sin;
  const VFloat first_third = zip_low(first, third), first_third_high = zip_high(first, third);
  const VFloat second_fourth = zip_low(second, fourth), second_fourth_high = zip_high(second, fourth);
  store_dense<VFloat>(z, zip_low(first_third, second_fourth));
  store_dense<VFloat>(z + w, zip_high(first_third, second_fourth));
  store_dense<VFloat>(z + 2 * w, zip_low(first_third_high, second_fourth_high));
  store_dense<VFloat>(z + 3 * w, zip_high(first_third_high, second_fourth_high));
}

NN_HD void normal_quad(double* z, uint64_t quad, const NoiseSource& source) {
  const PhiloxWords w = noise_words(source.seed, source.stream, quad);
  const auto even = box_muller_double(w.word[0], w.word[1]), odd = box_muller_double(w.word[2], w.word[3]);
  z[0] = even.first, z[1] = even.second, z[2] = odd.first, z[3] = odd.second;
}

// The elements that a buffer needs beyond `count`: up to 3 before the first normal, and the rest of the last batches.
constexpr int kNoiseSlack = kWordBatches * kNoiseBatch + 4;

// The normals of `count` positions from `position` on; returns the address of the first, in `buffer`.
inline const float* dense_normals(float* buffer, int64_t position, int64_t count, const NoiseSource& source) {
  const uint64_t first = uint64_t(position) / 4;
  const int64_t skip = position % 4;
  const int64_t end = skip + count;
  const LaneKeys keys(source.seed);
  const uint32_t stream = source.stream;
  for (int64_t i = 0; i < end; i += kWordBatches * kNoiseBatch)
    word_batches(buffer + i, first + uint64_t(i / 4), keys, stream);
  for (int64_t i = 0; i < end; i += kNoiseBatch) radius_batch(buffer + i);
  for (int64_t i = 0; i < end; i += kNoiseBatch) normal_batch(buffer + i);
  return buffer + skip;
}

inline const double* dense_normals(double* buffer, int64_t position, int64_t count,
                                   const NoiseSource& source) {
  const uint64_t first = uint64_t(position) / 4;
  const int64_t skip = position % 4;
  for (int64_t i = 0; i < skip + count; i += 4) normal_quad(buffer + i, first + uint64_t(i / 4), source);
  return buffer + skip;
}

NN_HD float scalar_normal(uint64_t index, const NoiseSource& source, float) {
  const PhiloxWords w = noise_words(source.seed, source.stream, index / 4);
  const auto pair = box_muller<float>(w.word[index % 4 < 2 ? 0 : 2], w.word[index % 4 < 2 ? 1 : 3]);
  return index % 2 ? pair.second : pair.first;
}
NN_HD double scalar_normal(uint64_t index, const NoiseSource& source, double) {
  const PhiloxWords w = noise_words(source.seed, source.stream, index / 4);
  const auto pair = box_muller_double(w.word[index % 4 < 2 ? 0 : 2], w.word[index % 4 < 2 ? 1 : 3]);
  return index % 2 ? pair.second : pair.first;
}

// The normals of `count` elements in the order of the layout; `buffer` has count + kNoiseSlack elements.
template <class T>
inline const T* normals(T* buffer, int64_t position, int64_t count, const NoiseSource& source) {
  if (!source.order.transposed) return dense_normals(buffer, position, count, source);
  // One counter per element, which is slow: the input's memory format changed between forward and backward.
  for (int64_t i = 0; i < count; ++i)
    buffer[i] = scalar_normal(transposed_index(source.order, position + i), source, T());
  return buffer;
}

}  // namespace
}  // namespace normnorm
