// Numbers of the host in device memory.

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace pycnf {
namespace {

constexpr int kValuesPerLaunch = 128;

template <typename T>
struct ValueBatch {
  T value[kValuesPerLaunch];
};

template <typename T>
__global__ void __launch_bounds__(kValuesPerLaunch)
    store_values_kernel(const __grid_constant__ ValueBatch<T> batch, int count, T* out) {
  const int i = int(threadIdx.x);
  if (i < count) out[i] = batch.value[i];
}

}  // namespace

template <typename T>
cudaError_t launch_store_values(const double* values, int64_t count, T* out, cudaStream_t stream) {
  for (int64_t at = 0; at < count; at += kValuesPerLaunch) {
    ValueBatch<T> batch = {};
    const int length = int(count - at < kValuesPerLaunch ? count - at : kValuesPerLaunch);
    for (int i = 0; i < length; ++i) batch.value[i] = T(values[at + i]);
    const auto error =
        launch(store_values_kernel<T>, 1, kValuesPerLaunch, 0, stream, batch, length, out + at);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_store_values(const double*, int64_t, float*, cudaStream_t);
template cudaError_t launch_store_values(const double*, int64_t, double*, cudaStream_t);

}  // namespace pycnf
