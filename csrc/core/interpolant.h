// Quartic interpolation over one step through y0, y1, the state at the middle, and both slopes
// (Shampine 1986).
#pragma once

#include "core/host_device.h"

namespace pycnf {

// p(x) = constant + slope x + second x^2 + third x^3 + fourth x^4 with x from 0 to 1 over the step.
template <typename T>
struct Quartic {
  T constant, slope, second, third, fourth;
};

template <typename T>
PYCNF_HD Quartic<T> fit_quartic(T y0, T y1, T middle, T f0, T f1, T h) {
  Quartic<T> p;
  p.constant = y0;
  p.slope = h * f0;
  p.second = h * (f1 - T(4) * f0) - T(11) * y0 - T(5) * y1 + T(16) * middle;
  p.third = h * (T(5) * f0 - T(3) * f1) + T(18) * y0 + T(14) * y1 - T(32) * middle;
  p.fourth = T(2) * h * (f1 - f0) - T(8) * (y1 + y0) + T(16) * middle;
  return p;
}

template <typename T>
PYCNF_HD T evaluate_quartic(const Quartic<T>& p, T x) {
  const T x2 = x * x;
  const T x3 = x2 * x;
  const T x4 = x3 * x;
  return p.constant + x * p.slope + x2 * p.second + x3 * p.third + x4 * p.fourth;
}

}  // namespace pycnf
