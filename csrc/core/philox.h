// Counter-based random probes: a probe value is a function of (seed, sample key, probe, feature),
// so it can be regenerated anywhere, and a sample sees the same probe whatever the batch, the order
// or the device.
//
// Philox4x32-10 (Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC
// 2011).
#pragma once

#include <math.h>

#include "core/elementary.h"
#include "core/host_device.h"

namespace pycnf {

struct Philox4 {
  uint32_t word[4];
};

PYCNF_HD Philox4 philox(uint64_t seed, uint64_t key, uint32_t probe, uint32_t block) {
  uint32_t c0 = block, c1 = probe, c2 = uint32_t(key), c3 = uint32_t(key >> 32);
  uint32_t k0 = uint32_t(seed), k1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t(0xD2511F53u) * c0;
    const uint64_t p1 = uint64_t(0xCD9E8D57u) * c2;
    c0 = uint32_t(p1 >> 32) ^ c1 ^ k0;
    c2 = uint32_t(p0 >> 32) ^ c3 ^ k1;
    c1 = uint32_t(p1);
    c3 = uint32_t(p0);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Rademacher: one bit a feature, so one block serves 128 features.
constexpr int kRademacherPerBlock = 128;

template <typename T>
PYCNF_HD T rademacher_bit(uint32_t word, int bit) {
  return (word >> bit) & 1u ? T(-1) : T(1);
}

template <typename T>
PYCNF_HD T rademacher(const Philox4& block, int feature_in_block) {
  return rademacher_bit<T>(block.word[feature_in_block / 32], feature_in_block % 32);
}

// By the names of C, as in core/elementary.h.
PYCNF_HD float polar_radius(float u) { return sqrtf(-2.f * logf(u)); }
PYCNF_HD double polar_radius(double u) { return ::sqrt(-2. * ::log(u)); }

// Gaussian by Box and Muller (1958): words 0, 1 give the first two of a block's four values, words
// 2, 3 the others.
constexpr int kGaussianPerBlock = 4;

template <typename T>
PYCNF_HD T gaussian(const Philox4& block, int feature_in_block) {
  const int pair = feature_in_block / 2 * 2;
  const T scale = T(2.3283064365386963e-10);  // 2^-32
  const T u = (T(block.word[pair]) + T(0.5)) * scale;
  const T angle = T(6.283185307179586) * ((T(block.word[pair + 1]) + T(0.5)) * scale);
  return polar_radius(u) * (feature_in_block % 2 == 0 ? cosine(angle) : sine(angle));
}

// Values of a probe that are made together: a block of Gaussian ones, bits of one word of Rademacher.
constexpr int kProbeGroup = 4;
static_assert(kGaussianPerBlock == kProbeGroup && kRademacherPerBlock % kProbeGroup == 0);

// Those of the features from `feature` on, a multiple of kProbeGroup.
template <typename T>
PYCNF_HD void probe_group(uint64_t seed, uint64_t key, uint32_t probe, int64_t feature,
                          bool is_gaussian, T (&out)[kProbeGroup]) {
  const int per_block = is_gaussian ? kGaussianPerBlock : kRademacherPerBlock;
  const Philox4 block = philox(seed, key, probe, uint32_t(feature / per_block));
  if (is_gaussian) {
    out[0] = gaussian<T>(block, 0);
    out[1] = gaussian<T>(block, 1);
    out[2] = gaussian<T>(block, 2);
    out[3] = gaussian<T>(block, 3);
    return;
  }
  // Chosen so that a GPU keeps the block in registers.
  const int first = int(feature % per_block), place = first / 32;
  const uint32_t low = place == 0 ? block.word[0] : block.word[1];
  const uint32_t high = place == 2 ? block.word[2] : block.word[3];
  const uint32_t word = place < 2 ? low : high;
  for (int i = 0; i < kProbeGroup; ++i) out[i] = rademacher_bit<T>(word, first % 32 + i);
}

// Steps of SplitMix64 (Steele, Lea & Flood, OOPSLA 2014) over the values' bits.
PYCNF_HD uint64_t mix_bits(uint64_t x) {
  x += 0x9E3779B97F4A7C15ull;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9ull;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EBull;
  return x ^ (x >> 31);
}

PYCNF_HD uint64_t value_bits(float x) {
  union {
    float value;
    uint32_t bits;
  } u = {x == 0.f ? 0.f : x};
  return u.bits;
}

PYCNF_HD uint64_t value_bits(double x) {
  union {
    double value;
    uint64_t bits;
  } u = {x == 0. ? 0. : x};
  return u.bits;
}

template <typename T>
PYCNF_HD uint64_t hash_row(const T* row, int64_t features) {
  uint64_t key = 0;
  for (int64_t d = 0; d < features; ++d) key = mix_bits(key ^ value_bits(row[d]));
  return key;
}

}  // namespace pycnf
