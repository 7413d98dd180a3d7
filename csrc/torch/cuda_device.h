// What the ops on a GPU share besides their arguments: the device, its stream, its checks.
#pragma once

#include <ATen/ATen.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

namespace pycnf {

using c10::cuda::CUDAGuard;

inline cudaStream_t current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

// One CUDA argument suffices to be dispatched to an op of a GPU.
inline void check_cuda(const at::Tensor& x, const char* name) {
  TORCH_CHECK(x.is_cuda(), name, " must be on the GPU like the other arguments, got ", x.device());
}

// Pinned memory of the host as the device sees it.
inline double* on_device(const at::Tensor& report) {
  void* pointer = nullptr;
  C10_CUDA_CHECK(cudaHostGetDevicePointer(&pointer, report.data_ptr<double>(), 0));
  return static_cast<double*>(pointer);
}

}  // namespace pycnf
