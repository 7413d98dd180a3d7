// Stands in for torch's header of this name: there is only one device, but who guards must have it.
#pragma once

#include <c10/core/Device.h>
#include <c10/util/Exception.h>

namespace c10::cuda {

class CUDAGuard {
 public:
  explicit CUDAGuard(Device device) {
    TORCH_CHECK(device.is_privateuseone(), "the guard of a GPU got ", device);
  }
  CUDAGuard(const CUDAGuard&) = delete;
  CUDAGuard& operator=(const CUDAGuard&) = delete;
};

}  // namespace c10::cuda
