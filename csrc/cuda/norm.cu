// The end of a norm: partial sums of ranges to the largest RMS of a segment.
//
// A launch of its own rather than the last block of the one before: that would need a counter in
// memory that is zero at the start and belongs to one stream. A step controller on the device has
// its place at the end of this kernel.

#include "cuda/norm.cuh"

namespace pycnf {
namespace {

constexpr int kReduceThreads = 512;
// Up to here a piece's ranges are summed by one warp, all warps busy with pieces of their own;
// above, by the block.
constexpr int kWarpRanges = 8 * kWarp;

struct PieceBatch {
  NormPiece piece[kFewPieces];
};

__global__ void __launch_bounds__(kFewPieces)
    store_pieces_kernel(const __grid_constant__ PieceBatch batch, int count, NormPiece* table) {
  const int piece = int(threadIdx.x);
  if (piece < count) table[piece] = batch.piece[piece];
}

// The largest RMS so far. As with Python's max(), a NaN counts only if it comes first, whence the
// order of the pieces does not matter but for the first segment's.
struct Largest {
  double rms[2];
  bool first_is_nan[2];
};

__device__ inline void take(Largest& largest, const NormPiece& piece, const NormPartial& sum) {
  const double count = double(piece.end - piece.begin);
  for (int which = 0; which < 2; ++which) {
    const double rms = sqrt(sum.sum_squares[which] / count);
    if (rms > largest.rms[which]) largest.rms[which] = rms;
    if (piece.segment == 0 && rms != rms) largest.first_is_nan[which] = true;
  }
}

// The part of a sum over ranges that falls to `thread` of `threads`.
__device__ inline NormPartial sum_of_ranges(const NormPartial* partials, int ranges, int thread,
                                            int threads) {
  NormPartial sum = {{0., 0.}, 0};
#pragma unroll 4
  for (int range = thread; range < ranges; range += threads) add(sum, partials[range]);
  return sum;
}

struct ReduceShared {
  NormPartial of_warp[kReduceThreads / kWarp];  // block_sum's
  Largest largest[kReduceThreads / kWarp];
};

__global__ void __launch_bounds__(kReduceThreads)
    reduce_norm_kernel(const __grid_constant__ NormLayout layout,
                       const NormPartial* partials,  // [ranges]
                       bool flag,
                       double* result) {  // [2]
  constexpr int kWarps = kReduceThreads / kWarp;
  const int thread = int(threadIdx.x), warp = thread / kWarp, lane = thread % kWarp;
  ReduceShared* shared = shared_memory<ReduceShared>();
  // Every lane goes through the same pieces; only a warp's first holds sums.
  Largest largest = {{0., 0.}, {false, false}};
  const int64_t chunk = layout.chunk;

  for (int q = warp; q < layout.pieces; q += kWarps) {
    const NormPiece piece = piece_of(layout, q);
    const int ranges = int(ranges_of_piece(piece.begin, piece.end, chunk));
    if (piece.segment < 0 || ranges > kWarpRanges) continue;
    const auto sum = warp_sum(sum_of_ranges(partials + piece.first_range, ranges, lane, kWarp));
    if (lane == 0) take(largest, piece, sum);
  }
  // No more than (all ranges) / kWarpRanges pieces get to a sum here.
  for (int q = 0; q < layout.pieces; ++q) {
    const NormPiece piece = piece_of(layout, q);
    const int ranges = int(ranges_of_piece(piece.begin, piece.end, chunk));
    if (piece.segment < 0 || ranges <= kWarpRanges) continue;
    const auto sum =
        block_sum(sum_of_ranges(partials + piece.first_range, ranges, thread, kReduceThreads));
    if (thread == 0) take(largest, piece, sum);
  }

  // Runs between segments belong to no norm, but must be finite too.
  const NormPartial all = block_sum(sum_of_ranges(partials, layout.ranges, thread, kReduceThreads));
  if (lane == 0) shared->largest[warp] = largest;
  barrier();
  if (thread != 0) return;
  double norm[2];
  for (int which = 0; which < 2; ++which) {
    norm[which] = largest.rms[which];
    bool first_is_nan = largest.first_is_nan[which];
    for (int other = 1; other < kWarps; ++other) {
      const Largest& theirs = shared->largest[other];
      if (theirs.rms[which] > norm[which]) norm[which] = theirs.rms[which];
      first_is_nan = first_is_nan || theirs.first_is_nan[which];
    }
    if (first_is_nan) norm[which] = nan("");
  }
  result[0] = norm[0];
  result[1] = flag ? (all.nonfinite == 0 ? 1. : 0.) : norm[1];
}

}  // namespace

cudaError_t launch_store_pieces(const NormPiece* pieces, int32_t count, NormPiece* table,
                                cudaStream_t stream) {
  for (int32_t at = 0; at < count; at += kFewPieces) {
    PieceBatch batch;
    const int32_t length = count - at < kFewPieces ? count - at : kFewPieces;
    for (int32_t i = 0; i < length; ++i) batch.piece[i] = pieces[at + i];
    const auto error =
        launch(store_pieces_kernel, 1, kFewPieces, 0, stream, batch, length, table + at);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

cudaError_t launch_reduce_norm(const NormLayout& layout, const NormPartial* partials, bool flag,
                               double* result, cudaStream_t stream) {
  return launch(reduce_norm_kernel, 1, kReduceThreads, sizeof(ReduceShared), stream, layout,
                partials, flag, result);
}

}  // namespace pycnf
