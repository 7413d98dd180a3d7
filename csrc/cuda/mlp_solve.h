// Solves with a narrow multilayer perceptron, each in one launch: the launchers. Pointers are device
// memory unless said otherwise; nothing here allocates or waits.
#pragma once

#include <cuda_runtime_api.h>

#include <type_traits>

#include "core/flow_attempt.h"
#include "core/mlp_solve.h"
#include "cuda/mlp_layout.h"

namespace pycnf {

// Where probes come from that are drawn; see core/philox.h.
template <typename T>
struct TileNoise {
  uint64_t seed;
  bool gaussian;
  int64_t* keys;  // [B]: given, or scratch for
  const T* rows;  // [B, D]: the hashes of these; or null
};

// What a solve hands to its kernels. `solve` is without a tableau; its `probe` [K, B, D] and
// `context` [B, width of the first layer] are the caller's own arrays.
template <typename T>
struct TileSolve {
  MlpSolve<T> solve;
  TileNoise<T> noise;
  Tableau tableau;
  TileLayout layout;
  int64_t batch;
  int64_t tiles;
};

// Sums of squared scaled values over a tile's samples, or of one sample.
struct TilePartial {
  double z;
  double logdet;
  double state;      // at the start of a solve
  double nonfinite;  // how many values are not
};

template <typename T>
struct MlpSolveParams {
  TileSolve<T> tile;
  const T* x;  // [B, D]
  // Adaptive: steps from start to end under a rule; else the grid's times.
  FlowRule rule;
  double start;
  double end;
  const double* grid;  // [grid_times], or null
  int64_t grid_times;
  T rtol;
  T atol;
  // Scratch.
  T* y;                   // [2, tiles, rows, samples]
  T* k;                   // [stages, tiles, rows, samples]
  TilePartial* partials;  // [2, tiles]
  // The tape, of up to `capacity` accepted steps; or null.
  double* times;  // [capacity, 3]
  T* states;      // [capacity, B, D]
  int64_t capacity;
  double* report;  // as FlowPlan's
  T* z;            // [B, D]
  T* extras;       // [extras, B]
};

// What the blocks of a solve with own steps count together; zeros before the launch.
struct SampleCounts {
  unsigned long long samples;  // begun, or one more for each that there was none for
  unsigned long long blocks;   // that have ended
  unsigned long long rows;     // of the tape that were asked for
  // Of the sample that has most.
  unsigned long long accepted;
  unsigned long long rejected;
  unsigned long long evaluations;
  unsigned long long failures;  // 1: some sample's
};

// Of a block's scratch, beside the stages: the state, the next one, and the error.
constexpr int kSlabs = 3;

// As MlpSolveParams.
template <typename T>
struct MlpSamplesParams {
  TileSolve<T> tile;
  const T* x;
  FlowRule rule;
  double start;
  double end;
  T rtol;
  T atol;
  // Scratch.
  T* scratch;            // [blocks, kSlabs + stages, rows, samples]
  SampleCounts* counts;  // [1]
  // The tape, of up to `capacity` rows; or null.
  double* times;      // [capacity, 4]: t, h, t_next and whether it ends the solve
  T* states;          // [capacity, D]
  int64_t* previous;  // [capacity]: the row before, -1 for none
  int64_t* newest;    // [B]
  int64_t capacity;
  double*
      report;  // [kSamplesReportNumbers]: rejected, ended, failures, accepted, evaluations, rows
  T* z;
  T* extras;
};

constexpr int kSamplesReportNumbers = 6;

// A parameter's gradient in sums of gradients: rows and columns so far apart.
template <typename T>
struct GradientPiece {
  int64_t first;  // of `out`, counted over all pieces
  int64_t rows, columns;
  int64_t place, row_stride, column_stride;
  T* out;  // [rows, columns]
};

template <typename T>
struct GradientPieces {
  int64_t total;  // numbers
  int count;
  GradientPiece<T> piece[5 * kMaxLayers];
};

template <typename T>
struct MlpGradientParams {
  TileSolve<T> tile;
  GradientPlaces places;
  const double* times;  // [steps, 3]: t, h and t_next
  const T* states;      // [steps, B, D]
  int64_t steps;
  // Or with steps of the samples' own: times [rows, 4] and states [rows, D], each sample's newest
  // row, and the one before each row, -1 for none.
  const int64_t* previous;  // [rows], or null
  const int64_t* newest;    // [B]
  const T* z_bar;           // [B, D]
  const T* extras_bar;      // [extras, B], or null: zeros
  // Scratch of each block.
  T* k;     // [blocks, 1 + 2 stages, rows, samples]
  T* sums;  // [blocks, places.numbers]
  // The gradients.
  GradientPieces<T> pieces;
  T* x_bar;        // [B, D]
  T* context_bar;  // [B, width of the first layer], zeros; or null
};

// How such a launch would fit on the device at hand: the layout, the blocks that run at a time, and
// bytes of shared memory. No blocks: it does not fit.
struct TilePlan {
  TileLayout layout;
  int64_t tiles;
  int64_t blocks;
  int threads;
  size_t shared_bytes;
};

// The kernels of one precision, in a source each: f32 has all, f64 kFloat32, for itself, alone.

template <typename T, Precision kPrecision>
cudaError_t plan_solve_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan);

template <typename T, Precision kPrecision>
cudaError_t plan_samples_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan);

template <typename T, Precision kPrecision>
cudaError_t plan_gradient_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan);

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_solve_in(const MlpSolveParams<T>& p, const TilePlan& plan,
                                cudaStream_t stream);

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_samples_in(const MlpSamplesParams<T>& p, const TilePlan& plan,
                                  cudaStream_t stream);

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_gradient_in(const MlpGradientParams<T>& p, const TilePlan& plan,
                                   cudaStream_t stream);

// Those of a solve's own precision.

// Calls body(std::integral_constant<Precision, precision>()).
template <typename T, typename Body>
cudaError_t with_precision(Precision precision, const Body& body) {
  using P = Precision;
  if constexpr (std::is_same_v<T, float>) {
    if (precision == P::kTf32) return body(std::integral_constant<P, P::kTf32>());
    if (precision == P::k3xTf32) return body(std::integral_constant<P, P::k3xTf32>());
    if (precision == P::kBf16) return body(std::integral_constant<P, P::kBf16>());
  }
  return body(std::integral_constant<P, P::kFloat32>());
}

template <typename T>
cudaError_t plan_solve(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return with_precision<T>(solve.precision, [&](auto precision) {
    return plan_solve_in<T, decltype(precision)::value>(solve, batch, plan);
  });
}

template <typename T>
cudaError_t plan_samples(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return with_precision<T>(solve.precision, [&](auto precision) {
    return plan_samples_in<T, decltype(precision)::value>(solve, batch, plan);
  });
}

template <typename T>
cudaError_t plan_gradient(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return with_precision<T>(solve.precision, [&](auto precision) {
    return plan_gradient_in<T, decltype(precision)::value>(solve, batch, plan);
  });
}

template <typename T>
cudaError_t launch_mlp_solve(const MlpSolveParams<T>& p, const TilePlan& plan,
                             cudaStream_t stream) {
  return with_precision<T>(p.tile.solve.precision, [&](auto precision) {
    return launch_mlp_solve_in<T, decltype(precision)::value>(p, plan, stream);
  });
}

template <typename T>
cudaError_t launch_mlp_samples(const MlpSamplesParams<T>& p, const TilePlan& plan,
                               cudaStream_t stream) {
  return with_precision<T>(p.tile.solve.precision, [&](auto precision) {
    return launch_mlp_samples_in<T, decltype(precision)::value>(p, plan, stream);
  });
}

template <typename T>
cudaError_t launch_mlp_gradient(const MlpGradientParams<T>& p, const TilePlan& plan,
                                cudaStream_t stream) {
  return with_precision<T>(p.tile.solve.precision, [&](auto precision) {
    return launch_mlp_gradient_in<T, decltype(precision)::value>(p, plan, stream);
  });
}

}  // namespace pycnf
