// Plain arguments of the kernels that evaluate a multilayer perceptron once, at given times. Arrays
// of samples are the caller's own, row after row.
#pragma once

#include "core/mlp.h"

namespace pycnf {

template <typename T>
struct MlpFieldInputs {
  int64_t batch;
  const MlpAt<T>* at;  // of the tile's time, or of its samples' times
  const T* z;          // [B, D]
  // Tangents [K, B, D]; where null, drawn from the keys; where these are null, unit vectors.
  const T* tangents;
  const int64_t* keys;  // [B]
  uint64_t seed;
  bool gaussian;
  const T* context;  // [B, width of the first layer] or null
  T* kept;           // [tiles, kept_numbers()] or null
};

template <typename T>
struct MlpFieldForward {
  T* value;       // f [B, D]
  T* divergence;  // [B] or null
  T* images;      // (∂f/∂z) ε_k [K, B, D] or null
};

// Cotangents of what MlpFieldForward has, and where the gradients go.
template <typename T>
struct MlpFieldReverse {
  const T* value_bar;                 // [B, D] or null
  const T* divergence_bar;            // [B] or null
  const T* images_bar;                // [K, B, D] or null; not beside divergence_bar
  T* z_bar;                           // [B, D]
  T* tangents_bar;                    // [K, B, D] or null
  T* context_bar;                     // [B, width of the first layer] or null
  double* time_bar;                   // [tiles], with own times [B]; or null
  const LayerGradient<T>* gradients;  // [layers], of this thread; null: those of neither parameters
                                      // nor time
  T* mixed_bar;                       // like MlpAt::mixed, of this thread
};

template <typename T>
struct MlpFieldVjp {
  int64_t count;        // K
  const T* cotangents;  // [K, B, D]
  T* value;             // [B, D]
  T* products;          // v_kᵀ ∂f/∂z [K, B, D]
};

}  // namespace pycnf
