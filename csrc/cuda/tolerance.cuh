// Tolerances on the device.
#pragma once

#include "core/params.h"
#include "cuda/device.cuh"

namespace pycnf {

// With the numbers that live in device memory in place.
template <typename T>
__device__ inline Tolerance<T> resolved(Tolerance<T> tolerance) {
  if (tolerance.rtol_device != nullptr) tolerance.rtol = T(*tolerance.rtol_device);
  if (tolerance.atol_device != nullptr) tolerance.atol = T(*tolerance.atol_device);
  return tolerance;
}

}  // namespace pycnf
