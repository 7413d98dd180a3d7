// How the passes of mlp_layer.cu and mlp_layer_reverse.cu go over the rows of a layer.
//
// A block owns kRowLanes rows at a time and 32 groups of neighbouring outputs, one for each lane of
// a warp: whatever the row, a warp's accesses are one run of memory.
#pragma once

#include "core/elementary.h"
#include "cuda/device.cuh"
#include "cuda/mlp_layer.h"

namespace pycnf {

constexpr int kRowLanes = kThreads / kWarp;

struct BlockRows {
  int64_t column;  // of this thread's group
  int64_t first;   // this thread's rows: first, first + kRowLanes, ..., below end
  int64_t end;
  int64_t index;  // of these rows among those of all blocks
};

inline int64_t blocks_across(int64_t out, int width) {
  return (out + kWarp * width - 1) / (kWarp * width);
}

// `rows` rows a block, all outputs of some rows after the other.
template <int kWidth>
__device__ inline BlockRows rows_of_block(int64_t batch, int64_t out, int64_t rows) {
  const int64_t across = (out + kWarp * kWidth - 1) / (kWarp * kWidth);
  const int64_t index = int64_t(blockIdx.x) / across;
  const int64_t lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t column = ((int64_t(blockIdx.x) - index * across) * kWarp + lane) * kWidth;
  const int64_t end = (index + 1) * rows;
  return {column, index * rows + warp, end < batch ? end : batch, index};
}

// Sum over a warp, in its first lane.
template <typename T>
__device__ inline T sum_of_warp(T value) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += shuffle_down(value, offset);
  return value;
}

template <int kWidth, typename T>
__device__ inline Group<T, kWidth> load_or(const T* from, int64_t i, T other) {
  return from != nullptr ? load<kWidth>(from + i) : filled<T, kWidth>(other);
}

// One row's products, before and after what the layer does to time.
template <int kWidth, typename T>
struct RowOfLayer {
  Group<T, kWidth> product;  // W a, with the context
  Group<T, kWidth> gate;
  Group<T, kWidth> h;
};

template <int kWidth, typename T>
__device__ inline RowOfLayer<kWidth, T> row_of_layer(const LayerProducts<T>& p, int64_t row,
                                                     int64_t column) {
  const int64_t i = row * p.out + column, time = row * p.time_stride + column;
  RowOfLayer<kWidth, T> of;
  of.product = load<kWidth>(p.value + i);
  if (p.context != nullptr) {
    const auto context = load<kWidth>(p.context + i);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) of.product.value[e] += context.value[e];
  }
  of.gate = load_or<kWidth>(p.gate, time, T(1));
  const auto shift = load<kWidth>(p.shift + time);
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    of.h.value[e] = of.gate.value[e] * of.product.value[e] + shift.value[e];
  }
  return of;
}

template <int kWidth, typename T>
__device__ inline Group<T, kWidth> tangent_of_layer(const LayerProducts<T>& p, int64_t k,
                                                    int64_t row, int64_t column) {
  return load_or<kWidth>(p.tangent, k * p.tangent_stride + row * p.sample_stride + column, T(1));
}

// Whether all rows of a layer's products can be moved in full groups.
template <typename T>
inline bool full_groups(const LayerProducts<T>& p) {
  return p.out % kFull<T> == 0 && p.tangent_stride % kFull<T> == 0 &&
         aligned({p.value, p.context, p.tangent, p.gate, p.shift});
}

template <Activation kind>
using Kind = std::integral_constant<Activation, kind>;

// Calls body(Kind<activation>): the activation is known when a kernel is compiled.
template <typename Body>
cudaError_t with_activation(Activation activation, const Body& body) {
  switch (activation) {
    case Activation::kTanh:
      return body(Kind<Activation::kTanh>());
    case Activation::kSoftplus:
      return body(Kind<Activation::kSoftplus>());
    case Activation::kElu:
      return body(Kind<Activation::kElu>());
    case Activation::kSilu:
      return body(Kind<Activation::kSilu>());
    case Activation::kSelu:
      return body(Kind<Activation::kSelu>());
    case Activation::kRelu:
      return body(Kind<Activation::kRelu>());
    case Activation::kGelu:
      return body(Kind<Activation::kGelu>());
    case Activation::kSin:
      return body(Kind<Activation::kSin>());
    case Activation::kSquare:
      return body(Kind<Activation::kSquare>());
    case Activation::kIdentity:
      return body(Kind<Activation::kIdentity>());
  }
  return cudaErrorInvalidValue;
}

// Calls body(Width<w>) for full groups or single elements.
template <typename T, typename Body>
cudaError_t with_width(bool full, const Body& body) {
  return full ? body(Width<kFull<T>>()) : body(Width<1>());
}

}  // namespace pycnf
