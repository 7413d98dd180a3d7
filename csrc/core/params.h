// Plain arguments of the kernels: what the torch side fills in and the CPU and CUDA sides read.
#pragma once

#include <cstdint>

#include "core/tableau.h"

namespace pycnf {

// A step's arithmetic is done in T. Storage is what its states are kept in: T, or on a GPU half as
// wide.

// Derivative rows of one step with their weights, multiplied by the step size.
template <typename Storage, typename T = Storage>
struct WeightedRows {
  const Storage* rows[kMaxStages];  // each [N]
  T weights[kMaxStages];
  int count;
  bool ordered;    // summed in the order of the rows, not in that of rk.h
  const T* scale;  // on a GPU: the step size in device memory, if the weights are still without it
};

// out = y0 + sum of weighted rows. When `fresh` is set, the newest row (rows[count - 1]) has not
// been stored yet: it is read from `fresh` and written to `fresh_row` on the way.
template <typename Storage, typename T = Storage>
struct StageParams {
  const Storage* y0;  // [N]
  WeightedRows<Storage, T> terms;
  const Storage* fresh;  // [N] or null
  Storage* fresh_row;    // [N]
  Storage* out;          // [N]
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
template <typename Storage, typename T = Storage>
struct FinishParams {
  const Storage* y0;                  // [N]
  WeightedRows<Storage, T> solution;  // count 0: y1 is there already
  WeightedRows<Storage, T> error;
  const Storage* fresh;  // [N] or null, as above; the newest row of both sums
  Storage* fresh_row;    // [N]
  Storage* y1;           // [N]
  Storage* ratio;        // [N] or null: the scaled error itself, for norms that are not ours
  Tolerance<T> tolerance;
};

// The quartic interpolant of a step at `times` points x = (t - t0) / (t1 - t0).
template <typename Storage, typename T = Storage>
struct InterpolateParams {
  const Storage* y0;  // [N]
  const Storage* y1;  // [N]
  const Storage* f0;  // [N]
  const Storage* f1;  // [N]
  WeightedRows<Storage, T> middle;
  T h;
  const T* x;  // [times]
  int64_t times;
  Storage* out;  // [times, N]
  int64_t size;
};

// Squared scaled values for the initial step: y0 / scale and f0 / scale, or (f1 - f0) / scale when
// f1 is there.
template <typename Storage, typename T = Storage>
struct InitialParams {
  const Storage* y0;  // [N]
  const Storage* f0;  // [N]
  const Storage* f1;  // [N] or null
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
