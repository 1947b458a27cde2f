// Philox4x32-7, the counter-based generator of Salmon, Moraes, Dror and Shaw (SC 2011), and its use for noise.
//
// The four words of counter k serve elements 8k..8k+7 of the canonical order, a pair each (normals.h): counter words 0
// and 1 hold k, word 2 the stream (the rank in a synchronised layer), word 3 is 0; the key is the seed.
#pragma once

#include <stdint.h>

#include "macros.h"

namespace normnorm {
namespace {

// Version of the noise drawn from a seed: STREAM_VERSION of normnorm/noise.py. normnorm/backends/cpu.py refuses another.
constexpr int kStreamVersion = 2;

struct PhiloxWords {
  uint32_t word[4];
};

constexpr uint32_t kPhiloxM0 = 0xD2511F53u, kPhiloxM1 = 0xCD9E8D57u;
constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
constexpr int kPhiloxRounds = 7;

// The keys of a round; next() computes those of the round after it.
struct PhiloxKeys {
  uint32_t first, second;
  NN_HD void next(int) {
    first += kPhiloxWeyl0;
    second += kPhiloxWeyl1;
  }
};

// `keys` starts with those of round 0.
template <class Keys>
NN_HD PhiloxWords philox_rounds(PhiloxWords counter, Keys keys) {
  uint32_t c0 = counter.word[0], c1 = counter.word[1], c2 = counter.word[2], c3 = counter.word[3];
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t p0 = uint64_t(kPhiloxM0) * c0, p1 = uint64_t(kPhiloxM1) * c2;
    const uint32_t n0 = uint32_t(p1 >> 32) ^ c1 ^ keys.first, n2 = uint32_t(p0 >> 32) ^ c3 ^ keys.second;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    c0 = n0;
    c2 = n2;
    keys.next(round);
  }
  return {{c0, c1, c2, c3}};
}

NN_HD PhiloxWords philox(PhiloxWords counter, uint32_t key0, uint32_t key1) {
  return philox_rounds(counter, PhiloxKeys{key0, key1});
}

NN_HD PhiloxWords noise_counter(uint64_t counter, uint32_t stream) {
  return {{uint32_t(counter), uint32_t(counter >> 32), stream, 0u}};
}
NN_HD PhiloxWords noise_words(uint64_t seed, uint32_t stream, uint64_t counter) {
  return philox(noise_counter(counter, stream), uint32_t(seed), uint32_t(seed >> 32));
}

}  // namespace
}  // namespace normnorm
