// A solve as one launch. No torch here.
#pragma once

#include <cuda_runtime_api.h>

namespace pycnf {

// One launch that repeats a recorded attempt until *done or *failure, in device memory, is not 0.
// cudaErrorNotSupported before CUDA 12.4.
cudaError_t make_while_graph(cudaGraph_t one_attempt, const double* done, const double* failure,
                             cudaGraphExec_t* result);

}  // namespace pycnf
