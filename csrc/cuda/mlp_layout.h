// Where things stand in the shared memory of a block that works on a tile of samples with a narrow
// multilayer perceptron, and where it adds up gradients. Host code; kernels read the results.
//
// Numbers of a tile are in rows, one for each feature: [features, stride], a sample a column, and
// behind the samples' columns as many for one tangent of each. The weights stand transposed,
// [in, weight_stride]. Strides are odd multiples of 16 bytes, so that what a warp reads of
// neighbouring rows lies in different banks.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/mlp_solve.h"

namespace pycnf {

// Offsets in numbers of the solve's dtype, -1 for what there is none of.
struct TileLayout {
  int samples;      // of a tile; a power of two
  int group_shift;  // log2 of how many groups of 16 bytes they are
  int stride;
  int weight[kMaxLayers];
  int weight_stride[kMaxLayers];
  int timed;              // numbers that an output has at a time: one, or one for each sample
  int gate[kMaxLayers];   // s [out, timed]
  int shift[kMaxLayers];  // s∘b + c [out, timed]
  int tau;                // τ [F, timed]
  int mixed;              // the closed form's Mᵀ [in, weight_stride] of the second layer, or m [in]
  int x[2];               // inputs and outputs of layers [widest, stride], in turns
  int slope[kMaxLayers];  // s∘φ' [out, samples] of hidden layers, where there are several tangents
  int sums;               // [2, samples]: of the divergence, and of the Jacobian's squares
  int z;                  // [D, samples]: a state
  int probe;              // [D, samples]: probes of one tangent, where they are not unit vectors
  int held;               // of which: a number of 64 bits
  // Of the gradient only.
  int unmixed;                  // Nᵀ, like M
  int mixed_bar;                // the cotangent of M
  int product[kMaxLayers];      // W a and W ȧ [out, stride]
  int u[2];                     // cotangents of products [widest, stride], in turns
  int curved[kMaxLayers];       // Σ φ''∘s∘W ȧ∘ȧ_bar [out, samples] of hidden layers, as `slope`
  int z_bar;                    // [D, samples]
  int extras_bar;               // [extras, samples]
  int shift_sum[kMaxLayers];    // [out, timed]
  int product_sum[kMaxLayers];  // [out, timed]
  int gradient;                 // sums of gradients, -1: they are not in shared memory
  int numbers;                  // in all
};

// Sums of gradients, in numbers from the first. Weights are transposed, with the strides of those
// in shared memory; what belongs to time is [F, out].
struct GradientPlaces {
  int weight[kMaxLayers];
  int bias[kMaxLayers];
  int gate_weight[kMaxLayers];
  int gate_bias[kMaxLayers];
  int shift_weight[kMaxLayers];
  int numbers;
};

// The least odd multiple of 16 bytes that holds so many numbers.
template <typename T>
int row_stride(int64_t count) {
  constexpr int64_t kGroup = 16 / sizeof(T);
  const int64_t groups = (count + kGroup - 1) / kGroup;
  return int((groups + 1 - groups % 2) * kGroup);
}

// What is more than that fits nowhere.
inline int at_most_an_int(int64_t count) {
  return int(std::min<int64_t>(count, std::numeric_limits<int>::max()));
}

template <typename T>
GradientPlaces gradient_places(const Mlp<T>& field) {
  constexpr int64_t kGroup = 16 / sizeof(T);
  GradientPlaces places = {};
  int64_t at = 0;
  const auto take = [&](int64_t count) {
    const int taken = int(at);
    at += (count + kGroup - 1) / kGroup * kGroup;
    return taken;
  };
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    places.weight[l] = take(layer.in * row_stride<T>(layer.out));
    places.bias[l] = take(layer.out);
    places.gate_weight[l] = take(field.time_features * layer.out);
    places.gate_bias[l] = take(layer.out);
    places.shift_weight[l] = take(field.time_features * layer.out);
  }
  places.numbers = at_most_an_int(at);
  return places;
}

template <typename T>
TileLayout tile_layout(const MlpSolve<T>& solve, int samples, bool with_gradient,
                       bool sums_in_shared) {
  constexpr int64_t kGroup = 16 / sizeof(T);
  const auto& field = solve.field;
  TileLayout layout = {};
  int64_t at = 0;
  const auto take = [&](int64_t count, bool wanted = true) {
    if (!wanted) return -1;
    const int taken = int(at);
    at += (count + kGroup - 1) / kGroup * kGroup;
    return taken;
  };
  const bool several = solve.tangents > 1;
  int64_t widest = field.features;
  for (int l = 0; l < field.layers; ++l) widest = std::max(widest, field.layer[l].out);
  layout.samples = samples;
  while (kGroup << layout.group_shift < samples) ++layout.group_shift;
  layout.timed = solve.own_times ? samples : 1;
  layout.stride = row_stride<T>(solve.tangents > 0 ? 2 * samples : samples);
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    layout.weight_stride[l] = row_stride<T>(layer.out);
    layout.weight[l] = take(layer.in * layout.weight_stride[l]);
    layout.gate[l] = take(layer.out * layout.timed);
    layout.shift[l] = take(layer.out * layout.timed);
    const bool hidden = l + 1 < field.layers;
    layout.slope[l] = take(layer.out * samples, hidden && several);
    layout.product[l] = take(layer.out * layout.stride, with_gradient);
    layout.curved[l] = take(layer.out * samples, hidden && several && with_gradient);
    layout.shift_sum[l] = take(layer.out * layout.timed, with_gradient);
    layout.product_sum[l] = take(layer.out * layout.timed, with_gradient);
  }
  const bool two_hidden = field.layers == 3;
  const int64_t mixed =
      two_hidden ? field.layer[1].in * layout.weight_stride[1] : field.layer[0].out;
  layout.tau = take(field.time_features * layout.timed);
  layout.mixed = take(mixed, solve.closed_form);
  layout.unmixed = take(mixed, solve.closed_form && with_gradient);
  layout.mixed_bar = take(mixed, solve.closed_form && with_gradient);
  for (int& x : layout.x) x = take(widest * layout.stride);
  for (int& u : layout.u) u = take(widest * layout.stride, with_gradient);
  layout.sums = take(2 * samples);
  layout.z = take(field.features * samples);
  layout.probe = take(field.features * samples, has_probes(solve));
  layout.held = take(8 / sizeof(T), has_probes(solve));
  layout.z_bar = take(field.features * samples, with_gradient);
  layout.extras_bar = take(extra_rows(solve) * samples, with_gradient);
  layout.gradient = take(gradient_places(field).numbers, with_gradient && sums_in_shared);
  layout.numbers = at_most_an_int(at);
  return layout;
}

}  // namespace pycnf
