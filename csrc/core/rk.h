// Formulas of a Runge-Kutta step, one element at a time.
#pragma once

#include "core/params.h"

namespace pycnf {

// Rounding decides step counts, so a weighted sum adds in the order in which ATen sums a short row
// on the CPU: terms fall into groups, a group is summed in the order of its terms, and the groups
// are added in ascending order. From one vector of 32 bytes on, there is a group for each lane
// after one for what is left over; below, four groups, the first with the rest.
constexpr int kSumGroups = 9;

template <typename T>
PYCNF_HD int sum_group(int term, int count) {
  const int lanes = 32 / int(sizeof(T));
  if (count >= lanes) return term < count / lanes * lanes ? 1 + term % lanes : 0;
  return term < count / 4 * 4 ? term % 4 : 0;
}

template <typename T>
PYCNF_HD T magnitude(T x) {
  return x < T(0) ? -x : x;
}

// The larger magnitude; NaN if either is.
template <typename T>
PYCNF_HD T larger_magnitude(T x, T y) {
  const T a = magnitude(x);
  const T b = magnitude(y);
  return a > b || a != a ? a : b;
}

// error / (atol + rtol * magnitude), in the state's dtype for plain tolerances and in f64 for one
// per element.
template <typename T>
PYCNF_HD T scaled(T value, T size, const Tolerance<T>& tolerance, int64_t i) {
  if (tolerance.rtol_each == nullptr && tolerance.atol_each == nullptr) {
    return value / (tolerance.atol + tolerance.rtol * size);
  }
  const double rtol = tolerance.rtol_each ? tolerance.rtol_each[i] : double(tolerance.rtol);
  const double atol = tolerance.atol_each ? tolerance.atol_each[i] : double(tolerance.atol);
  return T(double(value) / (atol + rtol * double(size)));
}

// x - x is 0 for finite x and NaN otherwise.
template <typename T>
PYCNF_HD bool is_finite(T x) {
  return x - x == T(0);
}

}  // namespace pycnf
