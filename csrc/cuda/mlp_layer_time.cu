// Gates and shifts of all layers at a time, and the gradients of what they are made of.

#include "cuda/mlp_layer.cuh"

namespace pycnf {
namespace {

#include "cuda/scalar.cuh"

template <typename T>
__global__ void __launch_bounds__(kThreads)
    time_features_kernel(const __grid_constant__ TimeFeatureParams<T> p) {
  const int64_t half = p.features / 2;
  for (int64_t item = global_thread(); item < p.times * half; item += global_threads()) {
    const int64_t row = item / half, k = item - row * half;
    const T order = T(k + 1) * T(M_PI);
    const T c = cosine(p.t[row] * order), s = sine(p.t[row] * order);
    const int64_t i = row * p.features + k;
    p.tau[i] = c;
    p.tau[i + half] = s;
    if (p.rate == nullptr) continue;
    p.rate[i] = -order * s;
    p.rate[i + half] = order * c;
  }
}

// Σ_f w_f τ_f of an output.
template <typename T>
__device__ inline T of_time(const OutputParameter<T>& weight, int64_t o, const T* tau,
                            int64_t features) {
  T sum = T(0);
  for (int64_t f = 0; f < features; ++f) {
    const T factor = tau != nullptr ? tau[f] : T(1);
    sum += weight.numbers[o * weight.output_stride + f * weight.feature_stride] * factor;
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    time_layers_kernel(const __grid_constant__ TimeParams<T> p) {
  for (int l = 0; l < p.layers; ++l) {
    const TimedOutputs<T>& layer = p.layer[l];
    for (int64_t i = global_thread(); i < layer.times * layer.out; i += global_threads()) {
      const int64_t row = i / layer.out, o = i - row * layer.out;
      const T* tau = p.tau + row * p.features;
      T s = T(1), c = T(0);
      if (layer.gate != nullptr) {
        T h = of_time(layer.gate_weight, o, tau, p.features);
        if (layer.gate_bias.numbers != nullptr) {
          h += layer.gate_bias.numbers[o * layer.gate_bias.output_stride];
        }
        s = sigmoid<T>(h);
        layer.gate[i] = s;
      }
      if (layer.shift_weight.numbers != nullptr) {
        c = of_time(layer.shift_weight, o, tau, p.features);
      }
      if (layer.bias.numbers != nullptr) {
        c += s * layer.bias.numbers[o * layer.bias.output_stride];
      }
      layer.shift[i] = c;
    }
  }
}

// A block adds up 32 outputs: each of its warps every eighth partial sum, the first what they have.
// Layers follow each other among the blocks.
template <typename T>
__global__ void __launch_bounds__(kThreads) sums_kernel(const __grid_constant__ SumParams<T> p) {
  int64_t block = blockIdx.x;
  int l = 0;
  for (; block >= (p.layer[l].out + kWarp - 1) / kWarp; ++l) {
    block -= (p.layer[l].out + kWarp - 1) / kWarp;
  }
  const SummedOutputs<T>& layer = p.layer[l];
  const int lane = int(threadIdx.x % kWarp), warp = int(threadIdx.x / kWarp);
  const int64_t o = block * kWarp + lane;
  T shift = T(0), product = T(0);
  if (o < layer.out && layer.partial != nullptr) {
#pragma unroll 4
    for (int64_t i = warp; i < p.count; i += kRowLanes) {
      shift += layer.partial[2 * i * layer.out + o];
      product += layer.partial[(2 * i + 1) * layer.out + o];
    }
  }
  T* shared = shared_memory<T>();  // [2, kRowLanes, kWarp]
  shared[threadIdx.x] = shift;
  shared[kThreads + threadIdx.x] = product;
  barrier();
  if (warp != 0 || o >= layer.out || layer.partial == nullptr) return;
  for (int w = 1; w < kRowLanes; ++w) {
    shift += shared[w * kWarp + lane];
    product += shared[kThreads + w * kWarp + lane];
  }
  const T s = layer.gate != nullptr ? layer.gate[o] : T(1);
  T time_bar = T(0);
  if (layer.bias_bar != nullptr) layer.bias_bar[o] = s * shift;
  if (layer.gate_weight.numbers != nullptr) {
    if (layer.bias.numbers != nullptr) {
      product += layer.bias.numbers[o * layer.bias.output_stride] * shift;
    }
    if (layer.gate_bar != nullptr) product += layer.gate_bar[o];
    const T bar = product * (s * (T(1) - s));
    if (layer.gate_bias_bar != nullptr) layer.gate_bias_bar[o] = bar;
    for (int64_t f = 0; f < p.features; ++f) {
      layer.gate_weight_bar[o * p.features + f] = bar * p.tau[f];
    }
    time_bar += bar * of_time(layer.gate_weight, o, p.rate, p.features);
  }
  if (layer.shift_weight.numbers != nullptr) {
    for (int64_t f = 0; f < p.features; ++f) {
      layer.shift_weight_bar[o * p.features + f] = shift * p.tau[f];
    }
    time_bar += shift * of_time(layer.shift_weight, o, p.rate, p.features);
  }
  layer.time_bar[o] = time_bar;
}

}  // namespace

template <typename T>
cudaError_t launch_time_features(const TimeFeatureParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = blocks_for(p.times * (p.features / 2), kThreads);
  return launch(time_features_kernel<T>, blocks, kThreads, 0, stream, p);
}

template <typename T>
cudaError_t launch_time_layers(const TimeParams<T>& p, cudaStream_t stream) {
  int64_t most = 0;
  for (int l = 0; l < p.layers; ++l) {
    const int64_t numbers = p.layer[l].times * p.layer[l].out;
    most = numbers > most ? numbers : most;
  }
  return launch(time_layers_kernel<T>, blocks_for(most, kThreads), kThreads, 0, stream, p);
}

template <typename T>
cudaError_t launch_sums(const SumParams<T>& p, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int l = 0; l < p.layers; ++l) blocks += (p.layer[l].out + kWarp - 1) / kWarp;
  return launch(sums_kernel<T>, blocks, kThreads, 2 * kThreads * sizeof(T), stream, p);
}

template cudaError_t launch_time_features(const TimeFeatureParams<float>&, cudaStream_t);
template cudaError_t launch_time_features(const TimeFeatureParams<double>&, cudaStream_t);
template cudaError_t launch_time_layers(const TimeParams<float>&, cudaStream_t);
template cudaError_t launch_time_layers(const TimeParams<double>&, cudaStream_t);
template cudaError_t launch_sums(const SumParams<float>&, cudaStream_t);
template cudaError_t launch_sums(const SumParams<double>&, cudaStream_t);

}  // namespace pycnf
