// A multilayer perceptron whose layers are, at a time t,
//
//     h = s∘(W a + b) + c,    s = σ(g τ + q) or 1,    c = v τ or 0,
//
// with τ = t itself or Fourier features of t: what the fused engine runs.
#pragma once

#include "core/host_device.h"

namespace pycnf {

constexpr int kMaxLayers = 16;

// In the order of pycnf.nn.activation.ACTIVATIONS.
enum class Activation : int {
  kTanh,
  kSoftplus,
  kElu,
  kSilu,
  kSelu,
  kRelu,
  kGelu,
  kSin,
  kSquare,
  kIdentity,
};
constexpr int kActivations = 10;

// Rows of outputs are whole vectors, filled up with zeros.
template <typename T>
struct MlpLayer {
  int64_t in;
  int64_t out;
  const T* weight;  // [out, in], rows `weight_stride` apart
  int64_t weight_stride;
  const T* turned;        // the weight's transpose [in, out], or null where it does not pay
  const T* bias;          // [out] or null
  const T* gate_weight;   // [F, out] or null: no gate
  const T* gate_bias;     // [out] or null
  const T* shift_weight;  // [F, out] or null: no shift
};

template <typename T>
struct Mlp {
  int layers;
  Activation activation;
  int64_t features;       // D
  int64_t time_features;  // F: 1 for t itself
  bool fourier;
  MlpLayer<T> layer[kMaxLayers];
};

// What a layer does to time: h = s∘(W a + b) + c. Each number stands for the whole batch, or is one
// for each sample of a tile where samples have times of their own.
template <typename T>
struct TimedLayer {
  const T* gate;        // s [out], ones without a gate
  const T* shift;       // s∘b + c [out]
  const T* gate_rate;   // g τ' [out], the time derivative of what the gate squashes; or null
  const T* shift_rate;  // v τ' [out]; or null
};

// The network at a time.
//
// The closed form of the divergence with two hidden layers is d₂ᵀ M d₁ with the slopes d = s∘φ' and
// M = W₂∘N, N = (W₁ diag(s₃) W₃)ᵀ; with one it is Σ d₁∘m, m the diagonal of W₁ diag(s₂) W₂.
template <typename T>
struct MlpAt {
  const TimedLayer<T>* layer;  // [layers]
  const T* tau;                // [F]
  const T* mixed;              // M [out of layer 2, padded], or m [padded]; or null
  const T* unmixed;            // N, like M
};

// Where a thread adds up the gradient of a layer. The weight's is kept with the wider of the two
// dimensions along a row, rows padded to whole vectors.
template <typename T>
struct LayerGradient {
  T* weight;  // [out, stride], or [in, stride] if `swapped`
  int64_t stride;
  bool swapped;
  T* bias;          // [out], padded
  T* gate_weight;   // [F, out], each padded, or null
  T* gate_bias;     // [out], padded
  T* shift_weight;  // [F, out], each padded, or null
};

}  // namespace pycnf
