// From a layer's products to its outputs: one pass over memory, values and tangents together.

#include "cuda/mlp_layer.cuh"

namespace pycnf {
namespace {

#include "cuda/scalar.cuh"
#include "core/activation.h"

// A group of outputs: φ(h), and s∘φ'(h), which tangents are multiplied by.
template <Activation kind, int kWidth, typename T>
__device__ inline void activate_group(const RowOfLayer<kWidth, T>& of, Group<T, kWidth>& value,
                                      Group<T, kWidth>& scale) {
#pragma unroll
  for (int e = 0; e < kWidth; ++e) {
    T slope;
    value.value[e] = activate<kind, T>(of.h.value[e], slope);
    scale.value[e] = of.gate.value[e] * slope;
  }
}

template <Activation kind, int kWidth, typename T>
__global__ void __launch_bounds__(kThreads)
    activate_kernel(const __grid_constant__ ActivateParams<T> p) {
  const auto& products = p.products;
  const auto rows = rows_of_block<kWidth>(products.batch, products.out, kRowLanes);
  if (rows.column >= products.out || rows.first >= rows.end) return;
  const auto of = row_of_layer<kWidth>(products, rows.first, rows.column);
  Group<T, kWidth> value, scale;
  activate_group<kind>(of, value, scale);
  const int64_t i = rows.first * products.out + rows.column;
  if (p.value != nullptr) store(p.value + i, value);
#pragma unroll 4
  for (int64_t k = 0; k < products.tangents; ++k) {
    auto tangent = tangent_of_layer<kWidth>(products, k, rows.first, rows.column);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) tangent.value[e] *= scale.value[e];
    store(p.tangent + k * products.batch * products.out + i, tangent);
  }
}

constexpr int kTraceThreads = 128;

// A block has one row.
template <Activation kind, int kWidth, typename T>
__global__ void __launch_bounds__(kTraceThreads)
    trace_kernel(const __grid_constant__ TraceParams<T> p) {
  const auto& products = p.products;
  const int64_t row = blockIdx.x;
  T sum = T(0);
  for (int64_t column = int64_t(threadIdx.x) * kWidth; column < products.out;
       column += kTraceThreads * kWidth) {
    const auto of = row_of_layer<kWidth>(products, row, column);
    Group<T, kWidth> value, scale;
    activate_group<kind>(of, value, scale);
    const auto tangent = tangent_of_layer<kWidth>(products, 0, row, column);
    const auto mixed = load_or<kWidth>(p.mixed, column, T(1));
    store(p.value + row * products.out + column, value);
#pragma unroll
    for (int e = 0; e < kWidth; ++e) sum += scale.value[e] * tangent.value[e] * mixed.value[e];
  }
  T* shared = shared_memory<T>();  // [warps]
  sum = sum_of_warp(sum);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = sum;
  barrier();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < kTraceThreads / kWarp; ++w) sum += shared[w];
  p.trace[row] = sum;
}

// A warp has one row. There are few features, next to a hidden layer's.
template <typename T>
__global__ void __launch_bounds__(kThreads) last_kernel(const __grid_constant__ LastParams<T> p) {
  const auto& products = p.products;
  const int64_t features = products.out, size = products.batch * features;
  const int64_t lane = threadIdx.x % kWarp;
  for (int64_t row = global_thread() / kWarp; row < products.batch;
       row += global_threads() / kWarp) {
    const auto gate = [&](int64_t o) {
      return products.gate != nullptr ? products.gate[row * products.time_stride + o] : T(1);
    };
    const auto image = [&](int64_t k, int64_t o) {
      return gate(o) * tangent_of_layer<1>(products, k, row, o).value[0];
    };
    T sum = T(0);
    for (int64_t o = lane; o < features; o += kWarp) {
      const int64_t i = row * features + o;
      if (p.value != nullptr) p.value[i] = row_of_layer<1>(products, row, o).h.value[0];
      for (int64_t k = 0; p.images != nullptr && k < products.tangents; ++k) {
        p.images[k * size + i] = image(k, o);
      }
      if (p.divergence == nullptr || p.probes.probe == nullptr) continue;
      for (int64_t k = 0; k < products.tangents; ++k) {
        sum += p.probes.probe[k * size + i] * image(k, o);
      }
    }
    if (p.divergence == nullptr) continue;
    if (p.probes.probe == nullptr) {
      for (int64_t k = lane; k < products.tangents; k += kWarp) sum += image(k, p.probes.first + k);
    }
    sum = sum_of_warp(sum * p.probes.weight);
    if (lane == 0) p.divergence[row] = p.add ? p.divergence[row] + sum : sum;
  }
}

template <Activation kind, typename T>
cudaError_t activate_by(const ActivateParams<T>& p, cudaStream_t stream) {
  const auto& products = p.products;
  return with_width<T>(full_groups(products) && aligned({p.value, p.tangent}), [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    const int64_t down = (products.batch + kRowLanes - 1) / kRowLanes;
    return launch(activate_kernel<kind, kWidth, T>, down * blocks_across(products.out, kWidth),
                  kThreads, 0, stream, p);
  });
}

template <Activation kind, typename T>
cudaError_t trace_by(const TraceParams<T>& p, cudaStream_t stream) {
  return with_width<T>(full_groups(p.products) && aligned({p.value, p.mixed}), [&](auto width) {
    return launch(trace_kernel<kind, decltype(width)::value, T>, p.products.batch, kTraceThreads,
                  kTraceThreads / kWarp * sizeof(T), stream, p);
  });
}

}  // namespace

template <typename T>
cudaError_t launch_activate(Activation activation, const ActivateParams<T>& p,
                            cudaStream_t stream) {
  return with_activation(activation,
                         [&](auto kind) { return activate_by<decltype(kind)::value>(p, stream); });
}

template <typename T>
cudaError_t launch_trace(Activation activation, const TraceParams<T>& p, cudaStream_t stream) {
  return with_activation(activation,
                         [&](auto kind) { return trace_by<decltype(kind)::value>(p, stream); });
}

template <typename T>
cudaError_t launch_last(const LastParams<T>& p, cudaStream_t stream) {
  return launch(last_kernel<T>, blocks_for(p.products.batch, kRowLanes), kThreads, 0, stream, p);
}

template cudaError_t launch_activate(Activation, const ActivateParams<float>&, cudaStream_t);
template cudaError_t launch_activate(Activation, const ActivateParams<double>&, cudaStream_t);
template cudaError_t launch_trace(Activation, const TraceParams<float>&, cudaStream_t);
template cudaError_t launch_trace(Activation, const TraceParams<double>&, cudaStream_t);
template cudaError_t launch_last(const LastParams<float>&, cudaStream_t);
template cudaError_t launch_last(const LastParams<double>&, cudaStream_t);

}  // namespace pycnf
