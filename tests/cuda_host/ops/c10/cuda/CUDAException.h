// Stands in for torch's header of this name.
#pragma once

#include <c10/util/Exception.h>

#include "grid.h"

namespace c10 {
class CUDAError : public Error {
  using Error::Error;
};
}  // namespace c10

#define C10_CUDA_CHECK(EXPR)                                                                     \
  do {                                                                                           \
    const cudaError_t error_of_call = EXPR;                                                      \
    TORCH_CHECK_WITH(CUDAError, error_of_call == cudaSuccess, "CUDA error ", int(error_of_call), \
                     ": ", cuda_host_error());                                                   \
  } while (0)
