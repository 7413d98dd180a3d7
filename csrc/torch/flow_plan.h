// From tensors to the plan of core/flow_attempt.h: the checks that the CPU and CUDA ops share.
#pragma once

#include <ATen/ATen.h>

#include <string_view>

#include "core/flow_attempt.h"
#include "torch/arguments.h"
#include "torch/plan_tensors.h"

namespace pycnf {

// The tensors of a plan, in the order of schema.cpp.
struct FlowTensors {
  at::Tensor attempt, times, h, tape, report;

  explicit FlowTensors(at::TensorList plan) {
    take_plan(plan, {{"attempt", &attempt},
                     {"times", &times},
                     {"h", &h},
                     {"tape", &tape},
                     {"report", &report}});
    TORCH_CHECK(attempt.numel() == kFlowNumbers, "attempt must be [", kFlowNumbers, "], got ",
                attempt.sizes());
    TORCH_CHECK(h.numel() == 1, "h must be [1], got ", h.sizes());
    TORCH_CHECK(tape.dim() == 2 && tape.size(1) == 3, "tape must be [steps, 3], got ",
                tape.sizes());
    TORCH_CHECK(report.numel() == kFlowReportNumbers, "report must be [", kFlowReportNumbers,
                "], got ", report.sizes());
  }
};

inline FlowMoment flow_moment(std::string_view name) {
  constexpr std::string_view names[] = {"begin", "first_step", "decide", "recall"};
  for (int i = 0; i < 4; ++i) {
    if (names[i] == name) return FlowMoment(i);
  }
  TORCH_CHECK(false, "moment must be begin, first_step, decide or recall, got ", name);
}

inline void check_flow_norms(FlowMoment moment, const std::optional<at::Tensor>& norms) {
  const bool needed = moment == FlowMoment::kBegin || moment == FlowMoment::kDecide;
  TORCH_CHECK(!needed || norms.has_value(), "norms are missing");
  if (!norms.has_value()) return;
  TORCH_CHECK(norms->scalar_type() == at::kDouble && norms->numel() == 2 && norms->is_contiguous(),
              "norms must be float64 [2], got ", norms->scalar_type(), " ", norms->sizes());
}

// `rule`: max_step, safety, ifactor, dfactor, max_num_steps, order. `report`: the report's memory
// as the kernels see it.
template <typename State>
FlowPlan<State> flow_plan(const FlowTensors& tensors, at::ArrayRef<double> rule,
                          at::ArrayRef<double> nodes, double* report) {
  TORCH_CHECK(rule.size() == 6, "rule must be 6 numbers, got ", rule.size());
  TORCH_CHECK(!nodes.empty() && nodes.size() <= size_t(kMaxStages), "nodes must be 1 to ",
              kMaxStages, " numbers, got ", nodes.size());
  TORCH_CHECK(tensors.times.numel() == int64_t(nodes.size()), "times must be [", nodes.size(),
              "], got ", tensors.times.sizes());
  FlowPlan<State> plan = {};
  plan.rule.control.max_step = rule[0];
  plan.rule.control.safety = rule[1];
  plan.rule.control.ifactor = rule[2];
  plan.rule.control.dfactor = rule[3];
  plan.rule.control.max_num_steps = int64_t(rule[4]);
  plan.rule.order = int(rule[5]);
  plan.rule.nodes = int(nodes.size());
  std::copy(nodes.begin(), nodes.end(), plan.rule.c);
  plan.attempt = reinterpret_cast<FlowAttempt*>(tensors.attempt.data_ptr<double>());
  plan.times = tensors.times.data_ptr<State>();
  plan.h = tensors.h.data_ptr<State>();
  plan.tape = tensors.tape.data_ptr<double>();
  plan.capacity = tensors.tape.size(0);
  plan.report = report;
  return plan;
}

// `tape` [steps, M]: the first M values of y at the start of every accepted step.
inline void check_flow_advance(const FlowTensors& plan, const at::Tensor& y, const at::Tensor& y1,
                               const at::Tensor& tape) {
  check_state(y, "y");
  check_like(y1, y, "y1");
  check_state(tape, "tape");
  TORCH_CHECK(tape.dim() == 2 && tape.size(0) == plan.tape.size(0) && tape.size(1) <= y.numel() &&
                  tape.scalar_type() == y.scalar_type() && tape.device() == y.device(),
              "tape must hold ", plan.tape.size(0), " states like y, got ", tape.sizes(), " of ",
              tape.scalar_type());
}

}  // namespace pycnf
