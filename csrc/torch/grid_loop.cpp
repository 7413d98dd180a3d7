#include "torch/grid_loop.h"

#include <ATen/Dispatch.h>
#include <c10/core/GradMode.h>
#include <c10/util/BFloat16-math.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <cstring>

#include "torch/find_op.h"

namespace pycnf {
namespace {

namespace py = pybind11;

// Steps whose times are made by one op: on a GPU that is one copy for all of them.
constexpr int64_t kStepsAtOnce = 64;

// A vector field written in Python, of a tensor or of a flat state seen as a tuple.
class Field {
 public:
  Field(py::object func, std::optional<std::vector<std::vector<int64_t>>> shapes)
      : func_(std::move(func)), shapes_(std::move(shapes)) {}

  // What func returns, whatever that is.
  py::object operator()(const at::Tensor& t, const at::Tensor& y) const {
    const auto time = wrap(t);
    const auto state = shapes_.has_value() ? tuple_of(y) : wrap(y);
    PyObject* arguments[] = {time.ptr(), state.ptr()};
    PyObject* result = PyObject_Vectorcall(func_.ptr(), arguments, 2, nullptr);
    if (result == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(result);
  }

  // The result as tensors that a kernel can read: of the state's dtype and device, a part for each
  // part of the state, without a graph. False for any other result.
  bool plain(const py::object& result, const at::Tensor& y, std::vector<at::Tensor>& parts) const {
    parts.clear();
    if (!shapes_.has_value()) return add(result, y, parts) && parts[0].sizes() == y.sizes();
    if (!PyTuple_Check(result.ptr()) && !PyList_Check(result.ptr())) return false;
    int64_t numbers = 0;
    for (const auto& part : py::reinterpret_borrow<py::sequence>(result)) {
      if (!add(part, y, parts)) return false;
      numbers += parts.back().numel();
    }
    return numbers == y.numel();
  }

 private:
  static py::object wrap(const at::Tensor& x) {
    return py::reinterpret_steal<py::object>(THPVariable_Wrap(x));
  }

  static bool add(py::handle x, const at::Tensor& y, std::vector<at::Tensor>& parts) {
    if (!THPVariable_Check(x.ptr())) return false;
    const auto& tensor = THPVariable_Unpack(x.ptr());
    parts.push_back(tensor);
    return tensor.scalar_type() == y.scalar_type() && tensor.device() == y.device() &&
           tensor.layout() == at::kStrided &&
           !(tensor.requires_grad() && c10::GradMode::is_enabled());
  }

  py::object tuple_of(const at::Tensor& y) const {
    py::tuple parts(shapes_->size());
    int64_t begin = 0;
    for (size_t i = 0; i < shapes_->size(); ++i) {
      const auto& shape = (*shapes_)[i];
      const int64_t size = c10::multiply_integers(shape);
      parts[i] = wrap(y.narrow(0, begin, size).view(shape));
      begin += size;
    }
    return parts;
  }

  py::object func_;
  std::optional<std::vector<std::vector<int64_t>>> shapes_;
};

using Numbers = std::vector<double>;

void write_row(const at::Tensor& solution, int64_t row, const at::Tensor& y) {
  if (y.is_cpu() && y.is_contiguous()) {
    auto* out = static_cast<char*>(solution.mutable_data_ptr()) + row * y.nbytes();
    std::memcpy(out, y.const_data_ptr(), y.nbytes());
  } else {
    solution.select(0, row).copy_(y);
  }
}

// The times of a grid's stages and of what its steps show, rounded as PyTorch rounds numbers of the
// times' dtype.
template <typename Time, typename State>
struct GridTimes {
  const Numbers& grid;
  const Numbers& outputs;
  const Numbers& c;
  double sign;
  bool ends_on_grid;
  bool perturb;

  Time size(int64_t step) const { return Time(grid[step + 1]) - Time(grid[step]); }

  double stage(int64_t step, size_t stage) const {
    const bool last = c[stage] == 1.;
    State s = last && ends_on_grid ? State(Time(grid[step + 1]))
                                   : State(Time(grid[step]) + Time(c[stage]) * size(step));
    if (perturb && stage == 0) s = std::nextafter(s, State(s + 1));
    if (perturb && stage != 0 && last) s = std::nextafter(s, State(s - 1));
    return sign * double(s);
  }

  // Where an output time lies in a step, from 0 to 1.
  double point(int64_t step, int64_t output) const {
    return double((Time(outputs[output]) - Time(grid[step])) / size(step));
  }
};

template <typename Time, typename State>
py::tuple steps_of(const Field& field, const at::Tensor& y0, const std::vector<Numbers>& a,
                   const Numbers& b, const GridTimes<Time, State>& grid, const at::Tensor& solution,
                   std::optional<py::list> states) {
  static const auto rk_stage =
      find_op<at::Tensor(const at::Tensor&, const at::Tensor&, bool, at::TensorList,
                         at::ArrayRef<double>, double)>("pycnf::rk_stage");
  static const auto time_tensors =
      find_op<std::vector<at::Tensor>(at::ArrayRef<double>, at::ScalarType, at::Device)>(
          "pycnf::time_tensors");
  const int64_t stages = b.size(), steps = int64_t(grid.grid.size()) - 1;
  const auto k = at::empty({stages, y0.numel()}, y0.options());
  const auto times_from = [&](int64_t step) {
    Numbers values;
    for (const int64_t end = std::min(step + kStepsAtOnce, steps); step < end; ++step) {
      for (int64_t stage = 0; stage < stages; ++stage) values.push_back(grid.stage(step, stage));
    }
    return time_tensors.call(values, y0.scalar_type(), y0.device());
  };
  auto y = y0;
  std::vector<at::Tensor> times, fresh;
  int64_t shown = 1;
  for (int64_t step = 0; step < steps; ++step) {
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
    if (step % kStepsAtOnce == 0) times = times_from(step);
    const double h = grid.sign * double(grid.size(step));
    for (int64_t stage = 0; stage < stages; ++stage) {
      const auto at = stage == 0 ? y : rk_stage.call(y, k, false, fresh, a[stage], h);
      const auto result = field(times[step % kStepsAtOnce * stages + stage], at);
      // A field may also have asked for gradients of the very state that it was given.
      if (!field.plain(result, y0, fresh) || (y.requires_grad() && c10::GradMode::is_enabled())) {
        return py::make_tuple(step, y, shown, k.narrow(0, 0, stage), result);
      }
    }
    if (states.has_value()) states->append(y);
    const auto y1 = rk_stage.call(y, k, false, fresh, b, h);
    for (; shown < int64_t(grid.outputs.size()) && grid.grid[step + 1] >= grid.outputs[shown];
         ++shown) {
      const double x = grid.point(step, shown);
      write_row(solution, shown, x == 1. ? y1 : at::add(y, at::mul(at::sub(y1, y), x)));
    }
    y = y1;
  }
  return py::make_tuple(steps, y, shown, k.narrow(0, 0, 0), py::none());
}

py::tuple grid_steps(py::object func, std::optional<std::vector<std::vector<int64_t>>> shapes,
                     const at::Tensor& y0, const std::vector<Numbers>& a, const Numbers& b,
                     const Numbers& c, const Numbers& grid, const Numbers& outputs,
                     at::ScalarType time_dtype, double sign, bool ends_on_grid, bool perturb,
                     const at::Tensor& solution, std::optional<py::list> states) {
  const Field field(std::move(func), std::move(shapes));
  return AT_DISPATCH_FLOATING_TYPES(time_dtype, "grid_steps", [&] {
    using Time = scalar_t;
    return AT_DISPATCH_FLOATING_TYPES_AND2(
        at::kHalf, at::kBFloat16, y0.scalar_type(), "grid_steps", [&] {
          const GridTimes<Time, scalar_t> times = {grid, outputs, c, sign, ends_on_grid, perturb};
          return steps_of(field, y0, a, b, times, solution, states);
        });
  });
}

}  // namespace

void bind_grid_loop(py::module_& m) {
  using py::arg;
  m.def("grid_steps", grid_steps, arg("func"), arg("shapes"), arg("y0"), arg("a"), arg("b"),
        arg("c"), arg("grid"), arg("outputs"), arg("time_dtype"), arg("sign"), arg("ends_on_grid"),
        arg("perturb"), arg("solution"), arg("states"));
}

}  // namespace pycnf
