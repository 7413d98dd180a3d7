// Plain arguments of the kernels: what the torch side fills in and the CPU and CUDA sides read.
#pragma once

#include <cstdint>

#include "core/tableau.h"

namespace pycnf {

// Derivative rows of one step with their weights, multiplied by the step size in the state's dtype.
template <typename T>
struct WeightedRows {
  const T* rows[kMaxStages];  // each [N]
  T weights[kMaxStages];
  int count;
  bool ordered;    // summed in the order of the rows, not in that of rk.h
  const T* scale;  // on a GPU: the step size in device memory, if the weights are still without it
};

// out = y0 + sum of weighted rows. When `fresh` is set, the newest row (rows[count - 1]) has not
// been stored yet: it is read from `fresh` and written to `fresh_row` on the way.
template <typename T>
struct StageParams {
  const T* y0;  // [N]
  WeightedRows<T> terms;
  const T* fresh;  // [N] or null
  T* fresh_row;    // [N]
  T* out;          // [N]
};

// Tolerances of a solve: one number each, or one per element of the state. A number that lives in
// device memory stays there, so that no host waits for it; the kernel puts it in place.
template <typename T>
struct Tolerance {
  T rtol;
  T atol;
  const double* rtol_each;    // [N] or null
  const double* atol_each;    // [N] or null
  const double* rtol_device;  // the number in device memory, or null
  const double* atol_device;  // the number in device memory, or null
};

// End of a step: solution, error estimate and the squared scaled error, in one pass.
template <typename T>
struct FinishParams {
  const T* y0;               // [N]
  WeightedRows<T> solution;  // count 0: y1 is there already
  WeightedRows<T> error;
  const T* fresh;  // [N] or null, as above; the newest row of both sums
  T* fresh_row;    // [N]
  T* y1;           // [N]
  T* ratio;        // [N] or null: the scaled error itself, for norms that are not ours
  Tolerance<T> tolerance;
};

// The quartic interpolant of a step at `times` points x = (t - t0) / (t1 - t0).
template <typename T>
struct InterpolateParams {
  const T* y0;  // [N]
  const T* y1;  // [N]
  const T* f0;  // [N]
  const T* f1;  // [N]
  WeightedRows<T> middle;
  T h;
  const T* x;  // [times]
  int64_t times;
  T* out;  // [times, N]
  int64_t size;
};

// Squared scaled values for the initial step: y0 / scale and f0 / scale, or (f1 - f0) / scale when
// f1 is there.
template <typename T>
struct InitialParams {
  const T* y0;  // [N]
  const T* f0;  // [N]
  const T* f1;  // [N] or null
  Tolerance<T> tolerance;
};

// What one range of elements adds to a norm.
struct NormPartial {
  double sum_squares[2];  // the second one serves the initial step only
  int64_t nonfinite;      // elements of y1 that are not finite
};

// Probes of one solve: out[k, b, d] from (seed, keys[b], k, d).
template <typename T>
struct ProbeParams {
  const int64_t* keys;  // [B]
  uint64_t seed;
  int64_t probes;
  int64_t batch;
  int64_t features;
  bool gaussian;
  T* out;  // [K, B, D]
};

// The next step of Broyden's method from the steps before it, see broyden_step in schema.cpp.
template <typename T>
struct BroydenParams {
  const T* const* steps;  // [count] of [N]
  int64_t count;
  const T* residual;  // [N]
  T* step;            // [N]
  int64_t size;
};

// keys[b] = hash of the values of row b; -0 counts as 0.
template <typename T>
struct KeyParams {
  const T* rows;  // [B, D]
  int64_t features;
  int64_t* keys;  // [B]
};

}  // namespace pycnf
