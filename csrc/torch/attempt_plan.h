// From tensors to the plan of core/attempt.h: the checks that the CPU and CUDA ops share.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "core/attempt.h"
#include "torch/arguments.h"
#include "torch/plan_tensors.h"

namespace pycnf {

// The tensors of a plan, in the order of schema.cpp.
struct PlanTensors {
  at::Tensor attempt, times, h, outputs, stops, report;

  explicit PlanTensors(at::TensorList plan) {
    take_plan(plan, {{"attempt", &attempt},
                     {"times", &times},
                     {"h", &h},
                     {"outputs", &outputs},
                     {"stops", &stops},
                     {"report", &report}});
    TORCH_CHECK(attempt.numel() == kAttemptNumbers, "attempt must be [", kAttemptNumbers, "], got ",
                attempt.sizes());
    TORCH_CHECK(h.numel() == 2, "h must be [2], got ", h.sizes());
    TORCH_CHECK(report.numel() >= kReportNumbers, "report must be [", kReportNumbers,
                "] or longer, got ", report.sizes());
  }
};

// `rule`: safety, ifactor, dfactor, min_step, max_step, max_num_steps, order, sign, plain.
inline StepRule step_rule(at::ArrayRef<double> rule, at::ArrayRef<double> nodes) {
  TORCH_CHECK(rule.size() == 9, "rule must be 9 numbers, got ", rule.size());
  TORCH_CHECK(!nodes.empty() && nodes.size() <= size_t(kMaxStages), "nodes must be 1 to ",
              kMaxStages, " numbers, got ", nodes.size());
  StepRule result = {};
  result.safety = rule[0];
  result.ifactor = rule[1];
  result.dfactor = rule[2];
  result.min_step = rule[3];
  result.max_step = rule[4];
  result.max_num_steps = rule[5];
  result.order = int(rule[6]);
  result.sign = int(rule[7]);
  result.plain = rule[8] != 0;
  result.nodes = int(nodes.size());
  std::copy(nodes.begin(), nodes.end(), result.c);
  return result;
}

// `report`: the report's memory as the kernels see it.
template <typename State>
AttemptPlan<State> attempt_plan(const PlanTensors& plan, at::ArrayRef<double> rule,
                                at::ArrayRef<double> nodes, double* report) {
  TORCH_CHECK(plan.times.numel() == int64_t(nodes.size()), "times must be [", nodes.size(),
              "], got ", plan.times.sizes());
  return {
      step_rule(rule, nodes),
      plan.outputs.const_data_ptr<double>(),
      plan.outputs.numel(),
      plan.stops.const_data_ptr<double>(),
      plan.stops.numel(),
      reinterpret_cast<Attempt*>(plan.attempt.data_ptr<double>()),
      plan.times.data_ptr<State>(),
      plan.h.data_ptr<State>(),
      report,
      plan.report.numel(),
  };
}

inline Moment attempt_moment(std::string_view name) {
  constexpr std::string_view names[] = {"begin", "first_step", "decide"};
  for (int i = 0; i < 3; ++i) {
    if (names[i] == name) return Moment(i);
  }
  TORCH_CHECK(false, "moment must be begin, first_step or decide, got ", name);
}

inline void check_norms(Moment moment, const std::optional<at::Tensor>& norms) {
  TORCH_CHECK(moment == Moment::kFirstStep || norms.has_value(), "norms are missing");
  if (!norms.has_value()) return;
  TORCH_CHECK(norms->scalar_type() == at::kDouble && norms->numel() == 2 && norms->is_contiguous(),
              "norms must be float64 [2], got ", norms->scalar_type(), " ", norms->sizes());
}

inline void check_advance(const PlanTensors& plan, const at::Tensor& y, const at::Tensor& y1,
                          const at::Tensor& solution) {
  check_state(y, "y");
  check_like(y1, y, "y1");
  check_state(solution, "solution");
  TORCH_CHECK(solution.numel() == plan.outputs.numel() * y.numel() &&
                  solution.scalar_type() == y.scalar_type() && solution.device() == y.device(),
              "solution must hold ", plan.outputs.numel(), " states of ", y.numel(),
              " values like y, got ", solution.sizes(), " of ", solution.scalar_type());
  TORCH_CHECK(plan.times.scalar_type() == y.scalar_type(), "times must be of y's dtype");
}

// Calls body with the C++ types of time and state.
template <typename Body>
void with_types(at::ScalarType time, at::ScalarType state, const Body& body) {
  TORCH_CHECK(time == at::kDouble || time == at::kFloat, "time must be float32 or float64, got ",
              time);
  TORCH_CHECK(state == at::kDouble || state == at::kFloat,
              "the state must be float32 or float64, got ", state);
  if (time == at::kDouble) {
    if (state == at::kDouble) {
      body(double(), double());
    } else {
      body(double(), float());
    }
  } else {
    TORCH_CHECK(state == at::kFloat, "time cannot be coarser than the state");
    body(float(), float());
  }
}

}  // namespace pycnf
