// The step-size policy of the flows, as pycnf/flows/control.py has it: f64 throughout.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/host_device.h"

namespace pycnf {

// A step that would end within this fraction of what is left goes to the end.
constexpr double kClose = 1e-10;
// A step this small, relative to the interval, is no step any more.
constexpr double kTiny = 1e-13;

struct StepControl {
  double rtol = 0;
  double atol = 0;
  double first_step = 0;  // 0: Hairer's
  double max_step = 0;
  double safety = 0;
  double ifactor = 0;
  double dfactor = 0;
  int64_t max_num_steps = 0;
};

// Python's, also where one of the two is NaN.
PYCNF_HD double smaller(double first, double second) { return second < first ? second : first; }
PYCNF_HD double larger(double first, double second) { return second > first ? second : first; }

PYCNF_HD bool is_finite_number(double x) { return x - x == 0; }

// What the next attempt's step is of this one's, given this one's error norm.
PYCNF_HD double step_factor(const StepControl& control, double error, int order) {
  if (!is_finite_number(error)) return control.dfactor;
  if (error == 0) return control.ifactor;
  const double least = error < 1 ? 1 : control.dfactor;
  return smaller(control.ifactor, larger(control.safety * pow(error, -1. / order), least));
}

// Hairer's h0, from the norms of the state and of its derivative; within the interval.
PYCNF_HD double trial_step(double d0, double d1, double length) {
  const double h0 = d0 < 1e-5 || d1 < 1e-5 ? 1e-6 : 0.01 * d0 / d1;
  return smaller(h0, length);
}

// Hairer's first step, from the norms of the first and (approximately) second derivative.
PYCNF_HD double initial_step(double h0, double d1, double d2, int order, double length) {
  const double h1 =
      d1 <= 1e-15 && d2 <= 1e-15 ? larger(1e-6, h0 * 1e-3) : pow(0.01 / larger(d1, d2), 1. / order);
  return smaller(smaller(100 * h0, h1), length);
}

}  // namespace pycnf
