// The flows' steps chosen where the state is, on the CPU: what the GPU's kernels do, by the same
// formulas (core/flow_attempt.h).

#include <torch/library.h>

#include "torch/find_op.h"
#include "torch/flow_plan.h"

namespace pycnf {
namespace {

void flow_control_cpu(at::TensorList plan, const std::optional<at::Tensor>& norms,
                      std::string_view name, at::ArrayRef<double> rule,
                      at::ArrayRef<double> nodes) {
  const FlowTensors tensors(plan);
  const auto moment = flow_moment(name);
  check_flow_norms(moment, norms);
  const auto* norm = norms.has_value() ? norms->const_data_ptr<double>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(tensors.times.scalar_type(), "flow_control", [&] {
    const auto p = flow_plan<scalar_t>(tensors, rule, nodes, tensors.report.data_ptr<double>());
    control_flow(moment, p, norm);
  });
}

void flow_advance_cpu(at::TensorList plan, const at::Tensor& y, const at::Tensor& y1,
                      const at::Tensor& k, const at::Tensor& tape) {
  const FlowTensors tensors(plan);
  check_flow_advance(tensors, y, y1, tape);
  const Rows rows(k, y, /*flip=*/false);
  const auto& attempt =
      *reinterpret_cast<const FlowAttempt*>(tensors.attempt.const_data_ptr<double>());
  if (attempt.accepted_now == 0) return;
  if (tape.size(0) > 0) {
    const auto kept = y.reshape({-1}).narrow(0, 0, tape.size(1));
    tape.select(0, int64_t(attempt.accepted) - 1).copy_(kept);
  }
  y.copy_(y1.view_as(y));
  k.select(0, 0).copy_(k.select(0, k.size(0) - 1));
}

at::Tensor attempt_combine_cpu(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights,
                               const at::Tensor& h) {
  check_step(h, y);
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, at::TensorList, at::ArrayRef<double>, double,
                         const std::optional<at::Tensor>&, bool)>("pycnf::rk_combine");
  return op.call(y, k, weights, h.reshape({-1})[0].item<double>(), std::nullopt, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("flow_control", flow_control_cpu);
  m.impl("flow_advance", flow_advance_cpu);
  m.impl("attempt_combine", attempt_combine_cpu);
}

}  // namespace pycnf
