// What the kernels that end in a norm share: the range of a block, and the sum over a block.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace pycnf {

__device__ inline NormPiece piece_of(const NormLayout& layout, int piece) {
  return layout.table != nullptr ? layout.table[piece] : layout.few[piece];
}

struct ElementRange {
  int64_t begin;
  int64_t end;
};

// The elements of a range: bisection for the last piece that does not begin after it.
__device__ inline ElementRange elements_of(const NormLayout& layout, int range) {
  int low = 0, high = layout.pieces;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (piece_of(layout, middle).first_range <= range) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const NormPiece piece = piece_of(layout, low);
  const int64_t begin = (piece.begin / layout.chunk + (range - piece.first_range)) * layout.chunk;
  const int64_t end = begin + layout.chunk;
  return {begin > piece.begin ? begin : piece.begin, end < piece.end ? end : piece.end};
}

__device__ inline void add(NormPartial& sum, const NormPartial& x) {
  sum.sum_squares[0] += x.sum_squares[0];
  sum.sum_squares[1] += x.sum_squares[1];
  sum.nonfinite += x.nonfinite;
}

// The sum over a warp, in its first lane. A fixed tree, so the same every time.
__device__ inline NormPartial warp_sum(NormPartial x) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    add(x, {{shuffle_down(x.sum_squares[0], offset), shuffle_down(x.sum_squares[1], offset)},
            shuffle_down(x.nonfinite, offset)});
  }
  return x;
}

// The sum over a block, in its first thread. Shared memory: one NormPartial a warp.
__device__ inline NormPartial block_sum(NormPartial x) {
  NormPartial* of_warp = shared_memory<NormPartial>();
  const int warps = int(blockDim.x) / kWarp;
  x = warp_sum(x);
  barrier();  // what an earlier call left there has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
  barrier();
  if (threadIdx.x == 0) {
    for (int warp = 1; warp < warps; ++warp) add(x, of_warp[warp]);
  }
  return x;
}

constexpr size_t block_sum_bytes(int threads) { return threads / kWarp * sizeof(NormPartial); }

// From the partial sums of all ranges to result[0] and result[1]: the norms of both sums, or, if
// `flag`, the norm of the first and 1 if everything was finite, else 0.
cudaError_t launch_reduce_norm(const NormLayout& layout, const NormPartial* partials, bool flag,
                               double* result, cudaStream_t stream);

}  // namespace pycnf
