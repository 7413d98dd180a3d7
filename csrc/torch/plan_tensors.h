// The tensors of a solve whose steps are chosen where the state is.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>
#include <utility>

#include "torch/arguments.h"

namespace pycnf {

// Puts the tensors of a plan into their members: first the attempt, then two in the state's dtype,
// times and h; all others are float64, and the last is a report in memory of the host.
inline void take_plan(at::TensorList plan,
                      std::initializer_list<std::pair<const char*, at::Tensor*>> members) {
  TORCH_CHECK(plan.size() == members.size(), "plan must have ", members.size(), " tensors, got ",
              plan.size());
  size_t i = 0;
  for (const auto& [name, member] : members) {
    const auto& tensor = plan[i];
    check_state(tensor, name);
    const bool of_state = i == 1 || i == 2;
    TORCH_CHECK(tensor.scalar_type() == (of_state ? plan[1].scalar_type() : at::kDouble), name,
                " must be ", of_state ? "of the state's dtype" : "float64", ", got ",
                tensor.scalar_type());
    const auto device = i + 1 == plan.size() ? at::Device(at::kCPU) : plan[0].device();
    TORCH_CHECK(tensor.device() == device, name, " must be on ", device, ", got ", tensor.device());
    *member = tensor;
    ++i;
  }
}

}  // namespace pycnf
