// Plain arguments of the kernels that solve with a multilayer perceptron, filled in by the torch
// side.
//
// States are kept by tiles: [tiles, rows, samples of a tile], the D rows of z and then, where there
// is a divergence, one of ℓ. The last tile is filled up with copies of the last sample.
#pragma once

#include "core/mlp.h"
#include "core/tableau.h"

namespace pycnf {

// What stays the same over a solve.
template <typename T>
struct MlpSolve {
  Mlp<T> field;
  const Tableau* tableau;
  int64_t batch;
  int64_t vectors;       // of samples in a tile
  int64_t tangents;      // K
  T probe_weight;        // 1 / K, or 1 for unit vectors
  T sign;                // of the divergence in dℓ/dt
  const T* probe;        // [tiles, D, K * samples], null without a divergence
  int64_t probe_stride;  // from tile to tile; 0 for unit vectors, which all tiles share
  const T* context;      // [tiles, width of the first layer, samples] or null
};

// Rows of the state: z, and ℓ where there is a divergence.
template <typename T>
PYCNF_HD int64_t state_rows(const MlpSolve<T>& solve) {
  return solve.field.features + (solve.tangents > 0 ? 1 : 0);
}

// Sums of squares over the samples of a tile.
struct MlpNorms {
  double z[2];
  double logdet[2];
  int64_t nonfinite;
};

// One attempted step, or the evaluation at its start.
template <typename T>
struct MlpAttempt {
  T h;
  T rtol;
  T atol;
  const TimedLayer<T>* timed;  // [stages, layers]
  const T* y0;                 // [tiles, rows, samples]
  T* y1;                       // [tiles, rows, samples]
  T* k;                        // [stages, tiles, rows, samples]
  bool flip;                   // the first and the last stage of k have changed places
  T* const* kept;              // [stages] of [tiles, kept_numbers()], null entries: not kept
  double* errors;              // [batch]: the error norm of every sample; or null
};

// The gradient of one accepted step.
template <typename T>
struct MlpReverseStep {
  T h;
  const TimedLayer<T>* timed;         // [stages, layers]
  const T* tau;                       // [stages, F]
  const T* y0;                        // [tiles, rows, samples], at the start of the step
  T* const* kept;                     // [stages] as above; all of the stages in use, or none
  const T* logdet_bar;                // [tiles, samples]
  T* z_bar;                           // [tiles, D, samples], at the end; then at the start
  T* context_bar;                     // [tiles, width of the first layer, samples] or null
  const LayerGradient<T>* gradients;  // [layers], of this thread
};

// Stages whose state enters the solution; the last of a first-same-as-last method does not.
PYCNF_HD int stages_in_use(const Tableau& tableau) {
  int count = tableau.stages;
  while (count > 1 && tableau.b[count - 1] == 0) --count;
  return count;
}

}  // namespace pycnf
