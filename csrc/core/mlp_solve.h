// Plain arguments of the kernels that solve with a multilayer perceptron, filled in by the torch
// side.
//
// States are kept by tiles: [tiles, rows, samples of a tile], the D rows of z and then, where there
// is a divergence, its extras: ℓ and a quadrature for each regularizer. The last tile is filled up
// with copies of the last sample.
#pragma once

#include "core/mlp.h"
#include "core/tableau.h"

namespace pycnf {

// Of the products of matrices, in f32 on a GPU: what their operands are rounded to. Sums are in f32.
// In the order of PRECISIONS in pycnf/flows/fused.py.
enum class Precision : int { kFloat32, kTf32, k3xTf32, kBf16 };

constexpr int kPrecisions = 4;

// What stays the same over a solve.
template <typename T>
struct MlpSolve {
  Mlp<T> field;
  const Tableau* tableau;
  int64_t vectors;       // of samples in a tile
  bool own_times;        // every sample has a time and a step of its own
  int64_t tangents;      // K; 1 for the closed form, whose tangents are the slopes
  bool drawn;            // of probes: they are drawn where they are needed
  bool closed_form;      // of the exact divergence
  T probe_weight;        // 1 / K, or 1 for unit vectors
  T sign;                // of the divergence in dℓ/dt
  bool kinetic;          // a row for w ‖f‖²
  bool jacobian;         // a row for w ‖∂f/∂z‖_F²
  T kinetic_weight;      // w, with the direction of time
  T jacobian_weight;     // likewise
  const T* probe;        // [tiles, D, K * samples]; null without a divergence, or if drawn
  int64_t probe_stride;  // from tile to tile; 0 for unit vectors, which all tiles share
  const T* context;      // [tiles, width of the first layer, samples] or null
  Precision precision;   // of the products
};

// Whether tangents are probes, and not unit vectors or the closed form's.
template <typename T>
PYCNF_HD bool has_probes(const MlpSolve<T>& solve) {
  return solve.drawn || solve.probe != nullptr;
}

template <typename T>
PYCNF_HD int64_t extra_rows(const MlpSolve<T>& solve) {
  return solve.tangents > 0 ? 1 + (solve.kinetic ? 1 : 0) + (solve.jacobian ? 1 : 0) : 0;
}

template <typename T>
PYCNF_HD int64_t state_rows(const MlpSolve<T>& solve) {
  return solve.field.features + extra_rows(solve);
}

// A sample's sums of squares of scaled values; infinite where a value is not finite. Of z and ℓ, or
// in the adjoint of z and its cotangent.
struct SampleNorms {
  double first;
  double second;
};

// One attempted step, or the evaluation at its start.
template <typename T>
struct MlpAttempt {
  T h;
  const T* own_h;  // [tiles, samples], with own times
  T rtol;
  T atol;
  const MlpAt<T>* at;  // [stages]
  const T* y0;         // [tiles, rows, samples]
  T* y1;               // [tiles, rows, samples]
  T* k;                // [stages, tiles, rows, samples]
  int64_t tiles;       // of k
  bool flip;           // the first and the last stage of k have changed places
  T* const* kept;      // [stages] of [tiles, kept_numbers()], null entries: not kept
  SampleNorms* norms;  // [tiles * samples]: of the error, of y0, or of a difference of rates
  SampleNorms* rates;  // [tiles * samples]: of the first stage; or null
};

// The gradient of one accepted step.
template <typename T>
struct MlpReverseStep {
  T h;
  const T* own_h;                     // [tiles, samples], with own times
  const MlpAt<T>* at;                 // [stages]
  const T* y0;                        // [tiles, rows, samples], at the start of the step
  int64_t rows;                       // of y0
  T* const* kept;                     // [stages] as above; all of the stages in use, or none
  const T* extras_bar;                // [tiles, extras, samples]
  T* z_bar;                           // [tiles, D, samples], at the end; then at the start
  T* context_bar;                     // [tiles, width of the first layer, samples] or null
  double* times_bar;                  // [tiles, 2, samples]: of t and of h; or null
  const LayerGradient<T>* gradients;  // [layers], of this thread
  T* const* mixed_bar;                // [stages] like MlpAt::mixed, of this thread
};

// One attempted step of the adjoint: its state is z and the cotangent of z, 2 D rows, and it goes
// the other way in time.
template <typename T>
struct MlpAdjointAttempt {
  MlpAttempt<T> attempt;
  const T* extras_bar;                       // [tiles, extras, samples]
  T* const* context_bar;                     // [stages] of [tiles, width, samples], or null
  const LayerGradient<T>* const* gradients;  // [stages] of [layers], of this thread
  T* const* mixed_bar;                       // [stages], of this thread
};

// Stages whose state enters the solution; the last of a first-same-as-last method does not.
PYCNF_HD int stages_in_use(const Tableau& tableau) {
  int count = tableau.stages;
  while (count > 1 && tableau.b[count - 1] == 0) --count;
  return count;
}

}  // namespace pycnf
