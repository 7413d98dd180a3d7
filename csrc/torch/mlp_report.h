// What a solve of the fused engine tells pycnf/flows/fused.py, and what it is told of its steps.
#pragma once

#include <ATen/ATen.h>

#include "core/control.h"

namespace pycnf {

// In the order of the names in pycnf/flows/fused.py.
enum class Status : int { kDone, kTooManySteps, kUnderflow, kStateNotFinite, kFieldNotFinite };

// Read by pycnf/flows/fused.py.
struct Report {
  int64_t accepted = 0;
  int64_t rejected = 0;
  int64_t evaluations = 0;
  double step_size = 0;  // what the controller would try next
  Status status = Status::kDone;
  double time = 0;  // where it failed
  double size = 0;
  bool finite = true;
  int64_t worst = 0;  // sample

  at::Tensor tensor() const {
    return at::tensor({double(accepted), double(rejected), double(evaluations), step_size,
                       double(int(status)), time, size, double(finite), double(worst)},
                      at::kDouble);
  }
};

inline StepControl read_control(at::ArrayRef<double> values) {
  TORCH_CHECK(values.size() == 8, "control must be 8 numbers, got ", values.size());
  return {values[0], values[1], values[2], values[3],
          values[4], values[5], values[6], int64_t(values[7])};
}

}  // namespace pycnf
