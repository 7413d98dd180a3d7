// Adds up the sums of gradients that the blocks of cuda/mlp_gradient.cuh leave.

#include "cuda/device.cuh"
#include "cuda/mlp_solve.h"

namespace pycnf {
namespace {

// A warp of a block has some of the sums' blocks, and of the numbers one for each lane.
constexpr int kParts = kThreads / kWarp;

template <typename T>
__global__ void __launch_bounds__(kThreads)
    gather_gradients_kernel(const __grid_constant__ GatherParams<T> p) {
  const int lane = int(threadIdx.x) % kWarp, part = int(threadIdx.x) / kWarp;
  T* const sums = shared_memory<T>();  // [kParts, kWarp]
  const int64_t i = int64_t(blockIdx.x) * kWarp + lane;
  int which = p.pieces - 1;
  while (which > 0 && p.piece[which].first > i) --which;
  const auto& piece = p.piece[which];
  // Neighbouring threads read neighbouring numbers.
  const int64_t row = (i - piece.first) % piece.rows, column = (i - piece.first) / piece.rows;
  const T* from = p.sums + piece.place + row * piece.row_stride + column * piece.column_stride;
  T sum = T(0);
#pragma unroll 4
  for (int64_t block = part; i < p.total && block < p.blocks; block += kParts) {
    sum += from[block * p.numbers];
  }
  sums[threadIdx.x] = sum;
  barrier();
  if (part > 0 || i >= p.total) return;
  for (int other = 1; other < kParts; ++other) sum += sums[other * kWarp + lane];
  piece.out[row * piece.columns + column] = sum;
}

}  // namespace

template <typename T>
cudaError_t launch_gather_gradients(const GatherParams<T>& p, cudaStream_t stream) {
  const int64_t blocks = (p.total + kWarp - 1) / kWarp;
  return launch(gather_gradients_kernel<T>, blocks, kThreads, kThreads * sizeof(T), stream, p);
}

template cudaError_t launch_gather_gradients(const GatherParams<float>&, cudaStream_t);
template cudaError_t launch_gather_gradients(const GatherParams<double>&, cudaStream_t);

}  // namespace pycnf
