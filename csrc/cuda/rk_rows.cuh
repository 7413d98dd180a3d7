// Weighted sums of the derivative rows of a step.
#pragma once

#include "core/rk.h"
#include "cuda/device.cuh"

namespace pycnf {

// Rows of which at least one of kSums sums has a non-zero weight, sorted by the group of the sum
// (sum_group in core/rk.h) and within a group by stage. A group's partial sum is then complete
// before the next begins, so one accumulator serves where the order of summation asks for up to
// nine, and the kernel neither reads a row for nothing nor indexes registers.
template <typename Storage, int kSums, typename T = Storage>
struct PackedRows {
  const Storage* row[kMaxStages];
  T weight[kSums][kMaxStages];
  const T* scale;  // of all weights, in device memory, or null
  uint32_t ends;   // bit j: row j is the last of its group
  int count;
};

// Sums over the same rows with equally many terms. Where the newest row comes from `fresh`, it is
// read there: other threads may not yet have stored it to `fresh_row`.
template <typename Storage, int kSums, typename T = Storage>
PackedRows<Storage, kSums, T> pack_rows(const WeightedRows<Storage, T>* const (&sums)[kSums],
                                        const Storage* fresh, const Storage* fresh_row) {
  PackedRows<Storage, kSums, T> packed = {};
  packed.scale = sums[0]->scale;
  const int terms = sums[0]->count;
  for (int group = 0; group < kSumGroups; ++group) {
    const int before = packed.count;
    for (int j = 0; j < terms; ++j) {
      bool wanted = false;
      for (int s = 0; s < kSums; ++s) wanted = wanted || sums[s]->weights[j] != T(0);
      const int own = sums[0]->ordered ? 0 : sum_group<T>(j, terms);
      if (!wanted || own != group) continue;
      const Storage* row = sums[0]->rows[j];
      packed.row[packed.count] = fresh != nullptr && row == fresh_row ? fresh : row;
      for (int s = 0; s < kSums; ++s) packed.weight[s][packed.count] = sums[s]->weights[j];
      ++packed.count;
    }
    if (packed.count > before) packed.ends |= 1u << (packed.count - 1);
  }
  return packed;
}

template <typename Storage, int kSums, typename T>
bool aligned(const PackedRows<Storage, kSums, T>& rows) {
  bool all = true;
  for (int j = 0; j < rows.count; ++j) all = all && aligned({rows.row[j]});
  return all;
}

// total[s] = sum s over elements [i, i + kWidth).
template <int kWidth, typename Storage, int kSums, typename T>
__device__ inline void weighted_sums(const PackedRows<Storage, kSums, T>& rows, int64_t i,
                                     Group<T, kWidth> (&total)[kSums]) {
  // -0 is what leaves every number unchanged when added, so a group without terms drops out, as in
  // the CPU kernels.
  constexpr T kNothing = T(-0.);
  // Loads of several rows are on their way before the first is used.
  constexpr int kInFlight = 4;
  const T scale = rows.scale == nullptr ? T(1) : *rows.scale;
  Group<T, kWidth> partial[kSums];
#pragma unroll
  for (int s = 0; s < kSums; ++s) partial[s] = total[s] = filled<T, kWidth>(kNothing);
  for (int j = 0; j < rows.count; j += kInFlight) {
    Group<Storage, kWidth> row[kInFlight];
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (j + u < rows.count) row[u] = fetch<kWidth>(rows.row[j + u] + i);
    }
#pragma unroll
    for (int u = 0; u < kInFlight; ++u) {
      if (j + u >= rows.count) continue;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        if (kSums > 1 && rows.weight[s][j + u] == T(0)) continue;  // the other sum wants this row
        const T weight = rows.weight[s][j + u] * scale;
#pragma unroll
        for (int e = 0; e < kWidth; ++e) partial[s].value[e] += widened(row[u].value[e]) * weight;
      }
      if ((rows.ends >> (j + u) & 1u) == 0) continue;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
#pragma unroll
        for (int e = 0; e < kWidth; ++e) total[s].value[e] += partial[s].value[e];
        partial[s] = filled<T, kWidth>(kNothing);
      }
    }
  }
}

// y0 + sum over elements [i, i + kWidth).
template <int kWidth, typename Storage, typename T>
__device__ inline Group<T, kWidth> advance(const Storage* y0, const PackedRows<Storage, 1, T>& rows,
                                           int64_t i) {
  const Group<T, kWidth> start = load<kWidth>(y0 + i);
  Group<T, kWidth> sum[1];
  weighted_sums(rows, i, sum);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) sum[0].value[e] = start.value[e] + sum[0].value[e];
  return sum[0];
}

// Comes after the sums: they have brought the row into the cache, while a store ahead of them would
// keep their loads waiting for its value.
template <int kWidth, typename Storage>
__device__ inline void store_fresh(const Storage* fresh, Storage* fresh_row, int64_t i) {
  if (fresh != nullptr) store<kWidth>(fresh_row + i, fetch<kWidth>(fresh + i));
}

}  // namespace pycnf
