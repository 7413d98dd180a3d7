// Adds up the sums of gradients that the blocks of cuda/mlp_gradient.cuh leave.

#include "cuda/device.cuh"
#include "cuda/mlp_solve.h"

namespace pycnf {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_gradients_kernel(const __grid_constant__ GatherParams<T> p) {
  for (int64_t i = global_thread(); i < p.total; i += global_threads()) {
    int which = p.pieces - 1;
    while (p.piece[which].first > i) --which;
    const auto& piece = p.piece[which];
    // Neighbouring threads read neighbouring numbers.
    const int64_t row = (i - piece.first) % piece.rows, column = (i - piece.first) / piece.rows;
    const T* from = p.sums + piece.place + row * piece.row_stride + column * piece.column_stride;
    T sum = T(0);
    for (int64_t block = 0; block < p.blocks; ++block) sum += from[block * p.numbers];
    piece.out[row * piece.columns + column] = sum;
  }
}

}  // namespace

template <typename T>
cudaError_t launch_gather_gradients(const GatherParams<T>& p, cudaStream_t stream) {
  return launch(gather_gradients_kernel<T>, blocks_for(p.total, kThreads), kThreads, 0, stream, p);
}

template cudaError_t launch_gather_gradients(const GatherParams<float>&, cudaStream_t);
template cudaError_t launch_gather_gradients(const GatherParams<double>&, cudaStream_t);

}  // namespace pycnf
