// The CUDA kernels' launchers. Pointers in the parameter structs are device memory unless said
// otherwise; nothing here allocates or waits. No torch here.
#pragma once

#include <cuda_runtime_api.h>

#include "core/attempt.h"
#include "core/flow_attempt.h"
#include "core/params.h"

namespace pycnf {

// ---- norms --------------------------------------------------------------------------------------

// A run of elements that belongs to one segment, or to none (-1), with the index of its first
// range.
struct NormPiece {
  int64_t begin;
  int64_t end;
  int32_t segment;
  int32_t first_range;
};

// Pieces that travel as an argument of the kernel; more go through a table in device memory.
constexpr int kFewPieces = 64;

// How a state is cut for a norm: into pieces at segment borders, and these into ranges at multiples
// of `chunk` elements. One block sums a range, so the order of summation depends on the state's
// size and segments alone, not on the device or on which block comes first.
struct NormLayout {
  int64_t chunk;
  int32_t pieces;
  int32_t ranges;
  const NormPiece* table;  // [pieces], or null: they are in `few`
  NormPiece few[kFewPieces];
};

// Elements of a range: one access of each thread for small states, which wait for memory; for large
// ones so many that a single block can add up what the ranges give.
PYCNF_HD int64_t norm_chunk(int64_t size) {
  constexpr int64_t kSmallest = 1024, kMostRanges = 8192;
  const int64_t sweeps = (size + kSmallest * kMostRanges - 1) / (kSmallest * kMostRanges);
  return kSmallest * (sweeps > 1 ? sweeps : 1);
}

PYCNF_HD int64_t ranges_of_piece(int64_t begin, int64_t end, int64_t chunk) {
  return begin < end ? (end - 1) / chunk - begin / chunk + 1 : 0;
}

// Copies pieces from host memory to a table in device memory, in the arguments of kernels: no
// pinned memory, nothing that must outlive the call, and it can be captured.
cudaError_t launch_store_pieces(const NormPiece* pieces,  // [count], host memory
                                int32_t count, NormPiece* table, cudaStream_t stream);

// ---- steps --------------------------------------------------------------------------------------

// The dtypes, as Storage and T of core/params.h: float, double, and __half and __nv_bfloat16 with
// floats.

template <typename Storage, typename T>
cudaError_t launch_stage(const StageParams<Storage, T>& p, int64_t size, cudaStream_t stream);

// result: error norm, then 1 if y1 is finite else 0. If p.solution has terms, then as many as
// p.error, over the same rows.
template <typename Storage, typename T>
cudaError_t launch_finish(const FinishParams<Storage, T>& p, const NormLayout& layout,
                          NormPartial* partials,  // [ranges]
                          double* result,         // [2]
                          cudaStream_t stream);

// result: the norms of y0 / scale and f0 / scale, or of (f1 - f0) / scale twice.
template <typename Storage, typename T>
cudaError_t launch_initial(const InitialParams<Storage, T>& p, const NormLayout& layout,
                           NormPartial* partials,  // [ranges]
                           double* result,         // [2]
                           cudaStream_t stream);

// Settles what core/attempt.h says. norms: [2] in device memory, or null.
template <typename Time, typename State>
cudaError_t launch_control(Moment moment, const AttemptPlan<State>& plan, const double* norms,
                           cudaStream_t stream);

// What follows an accepted step: its output times to `solution`, y1 to y, the last row of k to the
// first; nothing after another.
template <typename T>
struct AdvanceParams {
  const Attempt* attempt;
  const double* outputs;
  T* y;               // [N]
  const T* y1;        // [N]
  T* first_row;       // [N]
  const T* last_row;  // [N]
  WeightedRows<T> middle;
  const T* h;   // of the accepted step
  T* solution;  // [outputs, N]
  int64_t size;
};

template <typename Time, typename T>
cudaError_t launch_advance(const AdvanceParams<T>& p, cudaStream_t stream);

// Settles what core/flow_attempt.h says. norms: [2] in device memory, or null.
template <typename State>
cudaError_t launch_flow_control(FlowMoment moment, const FlowPlan<State>& plan, const double* norms,
                                cudaStream_t stream);

// What follows an accepted step of a flow: the state it began with to the tape, y1 to y, the last
// row of k to the first; nothing after another.
template <typename T>
struct FlowAdvanceParams {
  const FlowAttempt* attempt;
  T* y;               // [N]
  const T* y1;        // [N]
  T* first_row;       // [N]
  const T* last_row;  // [N]
  T* tape;            // [steps, kept] or null
  int64_t kept;       // of the N
  int64_t size;
};

template <typename State>
cudaError_t launch_flow_advance(const FlowAdvanceParams<State>& p, cudaStream_t stream);

// p.x is host memory: the points travel as arguments.
template <typename Storage, typename T>
cudaError_t launch_interpolate(const InterpolateParams<Storage, T>& p, cudaStream_t stream);

// Travel as arguments, as above: a copy from pageable memory waits for the GPU.
template <typename T>
cudaError_t launch_store_values(const double* values,  // [count], host memory
                                int64_t count, T* out, cudaStream_t stream);

// ---- probes -------------------------------------------------------------------------------------

template <typename T>
cudaError_t launch_sample_probes(const ProbeParams<T>& p, cudaStream_t stream);

template <typename T>
cudaError_t launch_hash_keys(const KeyParams<T>& p, int64_t batch, cudaStream_t stream);

}  // namespace pycnf
