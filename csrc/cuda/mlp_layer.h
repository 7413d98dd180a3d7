// Launchers of the passes between a wide network's products (torch/mlp_field_cuda.cpp): what a
// layer does to its products W a and W ȧ_k, element by element, and the reverse. No torch here.
//
// The mathematics is that of cpu/mlp_tile.h. Rows are samples [B, out]; tangents are [K, B, out].
// What belongs to a time is read from device memory, never by the host: numbers for each output, or
// for each sample and output where samples have times of their own.
#pragma once

#include <cuda_runtime_api.h>

#include "core/host_device.h"
#include "core/mlp.h"

namespace pycnf {

// Samples whose part in a sum over the batch is added up by one block; a second pass adds these
// partial sums in order. A function of the batch alone, so that sums do not depend on the device.
PYCNF_HD int64_t samples_of_sum(int64_t batch) { return batch > 4096 ? 64 : 16; }
PYCNF_HD int64_t partial_sums(int64_t batch) {
  return (batch + samples_of_sum(batch) - 1) / samples_of_sum(batch);
}

// ---- time ---------------------------------------------------------------------------------------

// F Fourier features of each time, and their derivatives.
template <typename T>
struct TimeFeatureParams {
  int64_t times;
  int64_t features;  // F
  const T* t;        // [times]
  T* tau;            // [times, F]
  T* rate;           // [times, F] or null
};

template <typename T>
cudaError_t launch_time_features(const TimeFeatureParams<T>& p, cudaStream_t stream);

// A parameter as its tensor has it: numbers of an output and a time feature so far apart.
template <typename T>
struct OutputParameter {
  const T* numbers;  // [out] or [out, F]; or null
  int64_t output_stride;
  int64_t feature_stride;
};

// What a layer does to time: see TimedLayer in core/mlp.h.
template <typename T>
struct TimedOutputs {
  int64_t out;
  int64_t times;  // 1 where all samples share what is made here
  OutputParameter<T> bias;
  OutputParameter<T> gate_weight;
  OutputParameter<T> gate_bias;
  OutputParameter<T> shift_weight;
  T* gate;   // s [times, out], or null without a gate
  T* shift;  // s∘b + c [times, out]
};

template <typename T>
struct TimeParams {
  int layers;
  int64_t features;  // F: 1 for t itself
  const T* tau;      // [times, F]
  TimedOutputs<T> layer[kMaxLayers];
};

template <typename T>
cudaError_t launch_time_layers(const TimeParams<T>& p, cudaStream_t stream);

// ---- forward ------------------------------------------------------------------------------------

// A layer's products and what it does to them.
template <typename T>
struct LayerProducts {
  int64_t batch;
  int64_t out;
  int64_t tangents;        // K
  const T* value;          // W a [B, out]
  const T* context;        // added to it, [B, out] or null
  const T* tangent;        // W ȧ [K, B, out]; or null: ones
  int64_t tangent_stride;  // from tangent to tangent
  int64_t sample_stride;   // from sample to sample: out, or 0 where all have the same
  const T* gate;           // [B or 1, out], or null without a gate
  const T* shift;          // [B or 1, out]
  int64_t time_stride;     // from sample to sample: out, or 0 where all share a time
};

// To the layer's outputs a' = φ(h) and ȧ' = φ'(h)∘ḣ.
template <typename T>
struct ActivateParams {
  LayerProducts<T> products;
  T* value;    // [B, out] or null
  T* tangent;  // [K, B, out], with tangents
};

template <typename T>
cudaError_t launch_activate(Activation activation, const ActivateParams<T>& p, cudaStream_t stream);

// The closed form's last activation: its one tangent is added up, Σ m∘d, and not stored.
template <typename T>
struct TraceParams {
  LayerProducts<T> products;
  const T* mixed;  // m [out], or null: ones
  T* value;        // [B, out]
  T* trace;        // [B]
};

template <typename T>
cudaError_t launch_trace(Activation activation, const TraceParams<T>& p, cudaStream_t stream);

// What the tangents of the last layer meet. Unit vectors are those of features `first` and on.
template <typename T>
struct Probes {
  const T* probe;  // [K, B, D]; or null: unit vectors
  int64_t first;
  T weight;  // 1 / K of all, or 1 for unit vectors
};

// The last layer has no activation. Null: not wanted.
template <typename T>
struct LastParams {
  LayerProducts<T> products;
  Probes<T> probes;
  T* value;       // f [B, D]
  T* images;      // (∂f/∂z) ε_k [K, B, D]
  T* divergence;  // [B]
  bool add;       // to the divergence that is there
};

template <typename T>
cudaError_t launch_last(const LastParams<T>& p, cudaStream_t stream);

// ---- reverse ------------------------------------------------------------------------------------

// Where the sums over samples go that parameters other than the weight need: Σ u and
// Σ u∘(W a) + Σ ū∘(W ȧ), u being the cotangent of the shift.
template <typename T>
struct LayerSums {
  T* partial;  // [partial_sums(B), 2, out] where the layer is the same for all samples; or null
  T* shift;    // the terms themselves, [B, out] each, where it is not; or null
  T* product;
  // Σ_k (W ȧ_k)∘ǡ'_k [B, out] of tangents that came before or, where the values come later, with
  // those that are here now; or null.
  const T* inner;
  T* inner_out;
};

// From cotangents of a layer's outputs to those of its products, and its outputs once more.
template <typename T>
struct ReverseParams {
  LayerProducts<T> products;
  const T* value_bar;      // [B, out]; null: tangents alone
  const T* tangent_bar;    // [K, B, out]; null in the closed form's last activation: μ m
  const T* trace_bar;      // μ [B]
  const T* mixed;          // m [out], or null: ones
  T* value_product_bar;    // s∘u [B, out]; may be value_bar
  T* tangent_product_bar;  // s∘ū [K, B, out]; may be tangent_bar; or null
  T* value;                // [B, out] or null
  T* tangent;              // [K, B, out] or null
  LayerSums<T> sums;
};

template <typename T>
cudaError_t launch_reverse(Activation activation, const ReverseParams<T>& p, cudaStream_t stream);

// The same of the last layer.
template <typename T>
struct ReverseLastParams {
  LayerProducts<T> products;
  Probes<T> probes;
  bool values;              // or tangents alone
  const T* value_bar;       // [B, D]; null: zeros
  const T* images_bar;      // [K, B, D] or null
  const T* divergence_bar;  // [B] or null
  T* value_product_bar;     // [B, D]
  T* tangent_product_bar;   // [K, B, D]
  T* probe_bar;             // the divergence's by its probes on the left [K, B, D], or null
  LayerSums<T> sums;
};

template <typename T>
cudaError_t launch_reverse_last(const ReverseLastParams<T>& p, cudaStream_t stream);

// From a layer's partial sums to the gradients of its parameters and of time.
template <typename T>
struct SummedOutputs {
  int64_t out;
  const T* partial;   // [count, 2, out]; null: nothing to do for this layer
  const T* gate;      // [out] or null
  const T* gate_bar;  // of the gate by another way [out], or null
  OutputParameter<T> bias;
  OutputParameter<T> gate_weight;
  OutputParameter<T> shift_weight;
  T* bias_bar;          // [out] or null, like all of these
  T* gate_weight_bar;   // [out, F]
  T* gate_bias_bar;     // [out]
  T* shift_weight_bar;  // [out, F]
  T* time_bar;          // each output's part [out]
};

template <typename T>
struct SumParams {
  int layers;
  int64_t count;     // of partial sums
  int64_t features;  // F
  const T* tau;      // [F]
  const T* rate;     // τ' [F]; null: 1
  SummedOutputs<T> layer[kMaxLayers];
};

template <typename T>
cudaError_t launch_sums(const SumParams<T>& p, cudaStream_t stream);

}  // namespace pycnf
