// pybind11 module `_C`: what the dispatcher cannot carry. Importing it registers the ops.

#include <ATen/Parallel.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <vector>

#include "core/tableau.h"
#include "torch/cpu_kernels.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled part of pycnf.";

  m.def("tableaux", [] {
    py::list result;
    for (const auto* t : pycnf::kTableaux) result.append(tableau_dict(*t));
    return result;
  });

  m.def("instruction_set", [] { return pycnf::cpu_kernels_of_this_machine().instruction_set; });

  m.def("parallel_info", [] { return at::get_parallel_info(); });

  m.attr("torch_version") = PYCNF_TORCH_VERSION;
  m.attr("torch_cuda") = PYCNF_TORCH_CUDA;
  m.attr("with_cuda") =
#ifdef PYCNF_WITH_CUDA
      true;
#else
      false;
#endif
}
