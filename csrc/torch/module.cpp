// pybind11 module `_C`: what the dispatcher cannot carry. Importing it registers the ops.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <atomic>
#include <chrono>
#include <vector>

#include "core/attempt.h"
#include "core/flow_attempt.h"
#include "core/tableau.h"
#include "torch/cpu_kernels.h"
#include "torch/find_op.h"
#include "torch/grid_loop.h"
#include "torch/interrupt.h"
#ifdef PYCNF_WITH_CUDA
#include "torch/while_graph.h"
#endif

namespace py = pybind11;

namespace {

std::vector<double> row(const double* values, int count) { return {values, values + count}; }

py::dict tableau_dict(const pycnf::Tableau& t) {
  py::list stages;
  for (int i = 0; i < t.stages; ++i) stages.append(row(t.a[i], i));
  py::dict result;
  result["name"] = t.name;
  result["order"] = t.order;
  result["stages"] = t.stages;
  result["adaptive"] = t.adaptive;
  result["solution_is_last_stage"] = t.solution_is_last_stage;
  result["c"] = row(t.c, t.stages);
  result["a"] = stages;
  result["b"] = row(t.b, t.stages);
  result["e"] = row(t.e, t.stages);
  result["m"] = row(t.m, t.stages);
  return result;
}

// The dispatcher's general way from Python boxes every argument by the schema, which takes longer
// than a step of a small state. The ops of the inner loop are therefore bound by their types; they
// are the same ops, dispatched as ever.
using pycnf::find_op;
using Tensors = std::vector<at::Tensor>;
using Numbers = std::vector<double>;
using MaybeTensor = std::optional<at::Tensor>;

at::Tensor rk_stage(const at::Tensor& y0, const at::Tensor& k, bool flip, const Tensors& fresh,
                    const Numbers& weights, double h) {
  static const auto op =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, bool, at::TensorList,
                         at::ArrayRef<double>, double)>("pycnf::rk_stage");
  return op.call(y0, k, flip, fresh, weights, h);
}

at::Tensor rk_finish(const at::Tensor& y0, const at::Tensor& k, bool flip, const Tensors& fresh,
                     const at::Tensor& y1, const Numbers& solution, const Numbers& error, double h,
                     const at::Tensor& rtol, const at::Tensor& atol,
                     const std::vector<int64_t>& segments, const MaybeTensor& ratio) {
  static const auto op = find_op<at::Tensor(
      const at::Tensor&, const at::Tensor&, bool, at::TensorList, const at::Tensor&,
      at::ArrayRef<double>, at::ArrayRef<double>, double, const at::Tensor&, const at::Tensor&,
      at::IntArrayRef, const MaybeTensor&)>("pycnf::rk_finish");
  return op.call(y0, k, flip, fresh, y1, solution, error, h, rtol, atol, segments, ratio);
}

at::Tensor rk_combine(const at::Tensor& y, const Tensors& k, const Numbers& weights, double h,
                      const MaybeTensor& h_graph, bool ordered) {
  static const auto op = find_op<at::Tensor(const at::Tensor&, at::TensorList, at::ArrayRef<double>,
                                            double, const MaybeTensor&, bool)>("pycnf::rk_combine");
  return op.call(y, k, weights, h, h_graph, ordered);
}

Tensors time_tensors(const Numbers& values, at::ScalarType dtype, at::Device device) {
  static const auto op =
      find_op<Tensors(at::ArrayRef<double>, at::ScalarType, at::Device)>("pycnf::time_tensors");
  return op.call(values, dtype, device);
}

// torch.autograd.grad(..., retain_graph=True, allow_unused=True) without its checks in Python, which
// take longer than the gradient of a small layer.
std::vector<MaybeTensor> pull_back(const Tensors& outputs, const Tensors& inputs,
                                   const Tensors& cotangents, bool create_graph) {
  Tensors found;
  try {
    const py::gil_scoped_release unlocked;
    found = torch::autograd::grad(outputs, inputs, cotangents, true, create_graph, true);
  } catch (python_error& error) {  // of a Function or a hook written in Python
    error.restore();
    throw py::error_already_set();
  }
  std::vector<MaybeTensor> result;
  for (auto& x : found) result.push_back(x.defined() ? MaybeTensor(std::move(x)) : std::nullopt);
  return result;
}

// Asked for at every step of a solve; the GIL is taken a few times a second only.
void check_signals() {
  using Clock = std::chrono::steady_clock;
  static std::atomic<Clock::rep> last = 0;
  const auto now = Clock::now().time_since_epoch().count();
  const auto pause = Clock::duration(std::chrono::milliseconds(100)).count();
  if (now - last.load(std::memory_order_relaxed) < pause) return;
  last.store(now, std::memory_order_relaxed);
  const py::gil_scoped_acquire locked;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  pycnf::check_interrupt = check_signals;
  m.doc() = "Compiled part of pycnf.";

  m.def("tableaux", [] {
    py::list result;
    for (const auto* t : pycnf::kTableaux) result.append(tableau_dict(*t));
    return result;
  });

  using Unlocked = py::call_guard<py::gil_scoped_release>;
  using py::arg;
  m.def("rk_stage", rk_stage, arg("y0"), arg("k"), arg("flip"), arg("fresh"), arg("weights"),
        arg("h"), Unlocked());
  m.def("rk_finish", rk_finish, arg("y0"), arg("k"), arg("flip"), arg("fresh"), arg("y1"),
        arg("solution"), arg("error"), arg("h"), arg("rtol"), arg("atol"), arg("segments"),
        arg("ratio"), Unlocked());
  m.def("rk_combine", rk_combine, arg("y"), arg("k"), arg("weights"), arg("h"),
        arg("h_graph") = py::none(), arg("ordered") = false, Unlocked());
  m.def("time_tensors", time_tensors, arg("values"), arg("dtype"), arg("device"), Unlocked());

  m.def("pull_back", pull_back, arg("outputs"), arg("inputs"), arg("cotangents"),
        arg("create_graph"));

  pycnf::bind_grid_loop(m);
#ifdef PYCNF_WITH_CUDA
  pycnf::bind_while_graph(m);
#endif

  m.def("instruction_set", [] { return pycnf::cpu_kernels_of_this_machine().instruction_set; });

  m.def("parallel_info", [] { return at::get_parallel_info(); });

  py::list fields;
  for (const char* field : pycnf::kAttemptFields) fields.append(field);
  m.attr("attempt_fields") = fields;
  m.attr("report_numbers") = pycnf::kReportNumbers;
  py::list flow_fields;
  for (const char* field : pycnf::kFlowFields) flow_fields.append(field);
  m.attr("flow_fields") = flow_fields;
  m.attr("flow_report_numbers") = pycnf::kFlowReportNumbers;

  m.attr("torch_version") = PYCNF_TORCH_VERSION;
  m.attr("torch_cuda") = PYCNF_TORCH_CUDA;
  m.attr("with_cuda") =
#ifdef PYCNF_WITH_CUDA
      true;
#else
      false;
#endif
}
