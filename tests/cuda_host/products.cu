// The products of csrc/cuda/tile_tensor.cuh by themselves, for tests/test_cuda_tensor_host.py.

#include "cuda/mlp_layout.h"
#include "cuda/tile_tensor.cuh"

namespace {

using namespace pycnf;

// Which of the products: y = wᵀ x, y = w u, or sum += x uᵀ.
enum Kind { kProduct, kTurned, kOuter };

// The matrices in device memory, rows side by side: w [in, out], and columns of `in` and of `out`
// rows, each an argument or a result.
struct Sizes {
  int out, in, count;
};

__device__ void copy(const float* from, int rows, int width, float* to, int stride) {
  for (int i = int(threadIdx.x); i < rows * width; i += int(blockDim.x)) {
    to[i / width * stride + i % width] = from[i];
  }
}

__device__ void copy_back(const float* from, int stride, int rows, int width, float* to) {
  for (int i = int(threadIdx.x); i < rows * width; i += int(blockDim.x)) {
    to[i] = from[i / width * stride + i % width];
  }
}

template <Precision kPrecision>
__global__ void product_kernel(Kind kind, Sizes size, int weight_stride, int stride, float* w,
                               float* x, float* u) {
  float* const weight = shared_memory<float>();
  const Columns<float> inputs = {weight + size.in * weight_stride, stride};
  const Columns<float> outputs = {inputs.row(size.in), stride};
  copy(w, size.in, size.out, weight, weight_stride);
  for (int i = int(threadIdx.x); i < size.in; i += int(blockDim.x)) {
    for (int o = size.out; o < weight_stride; ++o) weight[i * weight_stride + o] = 0;
  }
  if (kind != kTurned) copy(x, size.in, size.count, inputs.at, stride);
  if (kind != kProduct) copy(u, size.out, size.count, outputs.at, stride);
  barrier();
  if (kind == kProduct) {
    product<kPrecision>(weight, weight_stride, size.out, size.in, inputs, size.count, outputs);
  } else if (kind == kTurned) {
    turned_product<kPrecision>(weight, weight_stride, size.out, size.in, outputs, size.count,
                               inputs);
  } else {
    add_outer<kPrecision>(size.out, size.in, outputs, inputs, size.count, weight, weight_stride);
  }
  barrier();
  copy_back(weight, weight_stride, size.in, size.out, w);
  if (kind == kTurned) copy_back(inputs.at, stride, size.in, size.count, x);
  if (kind == kProduct) copy_back(outputs.at, stride, size.out, size.count, u);
}

}  // namespace

extern "C" cudaError_t check_product(int precision, int kind, int threads, int out, int in,
                                     int count, float* w, float* x, float* u) {
  const Sizes size = {out, in, count};
  const int weight_stride = row_stride<float>(out), stride = row_stride<float>(count);
  const auto kernel = precision == 1   ? product_kernel<Precision::kTf32>
                      : precision == 2 ? product_kernel<Precision::k3xTf32>
                      : precision == 3 ? product_kernel<Precision::kBf16>
                                       : product_kernel<Precision::kFloat32>;
  const size_t bytes = sizeof(float) * size_t(in * weight_stride + (in + out) * stride);
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  const auto failure = cudaFuncSetAttribute(kernel, attribute, int(bytes));
  if (failure != cudaSuccess) return failure;
  return launch(kernel, 1, threads, bytes, nullptr, Kind(kind), size, weight_stride, stride, w, x,
                u);
}
