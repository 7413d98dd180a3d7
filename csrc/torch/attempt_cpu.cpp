// Steps that are chosen where the state is, on the CPU: what the GPU's kernels do, by the same
// formulas (core/attempt.h).

#include <ATen/Parallel.h>
#include <torch/library.h>

#include "torch/attempt_plan.h"
#include "torch/cpu_kernels.h"

namespace pycnf {
namespace {

void attempt_control_cpu(at::TensorList tensors, const std::optional<at::Tensor>& norms,
                         std::string_view name, at::ArrayRef<double> rule,
                         at::ArrayRef<double> nodes, at::ScalarType time) {
  const PlanTensors plan(tensors);
  const auto moment = attempt_moment(name);
  check_norms(moment, norms);
  with_types(time, plan.times.scalar_type(), [&](auto time_number, auto state_number) {
    using State = decltype(state_number);
    const auto p = attempt_plan<State>(plan, rule, nodes, plan.report.data_ptr<double>());
    const auto* norm = norms.has_value() ? norms->const_data_ptr<double>() : nullptr;
    control_attempt<decltype(time_number)>(moment, p, norm);
  });
}

void attempt_advance_cpu(at::TensorList tensors, const at::Tensor& y, const at::Tensor& y1,
                         const at::Tensor& k, at::ArrayRef<double> middle,
                         const at::Tensor& solution, at::ScalarType time) {
  const PlanTensors plan(tensors);
  check_advance(plan, y, y1, solution);
  const Rows rows(k, y, /*flip=*/false);
  const auto& attempt = *reinterpret_cast<const Attempt*>(plan.attempt.const_data_ptr<double>());
  if (attempt.accepted_now == 0) return;
  const int64_t first = int64_t(attempt.first_output), last = int64_t(attempt.last_output);
  with_types(time, y.scalar_type(), [&](auto time_number, auto state_number) {
    using Time = decltype(time_number);
    using State = decltype(state_number);
    if (last > first) {
      const auto x = at::empty({last - first}, y.options());
      for (int64_t i = 0; i < last - first; ++i) {
        x.data_ptr<State>()[i] =
            step_point<Time, State>(attempt, plan.outputs.const_data_ptr<double>()[first + i]);
      }
      const double h = double(plan.h.const_data_ptr<State>()[1]);
      const auto p = interpolate_params<State>(y, y1, rows, middle, h, x,
                                               solution.narrow(0, first, last - first));
      const auto& table = cpu_kernels<State>();
      at::parallel_for(0, y.numel(), 32768,
                       [&](int64_t begin, int64_t end) { table.interpolate(p, begin, end); });
    }
  });
  y.copy_(y1.view_as(y));
  k.select(0, 0).copy_(k.select(0, k.size(0) - 1));
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("attempt_control", attempt_control_cpu);
  m.impl("attempt_advance", attempt_advance_cpu);
}

}  // namespace pycnf
