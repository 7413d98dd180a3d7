// The discrete gradients of the fused engine's solves on a GPU: one launch.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <vector>

#include "torch/mlp_device.h"

namespace pycnf {
namespace {

using GradientResult = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor>;

// Where each parameter's gradient is in the sums, and the tensors that it goes to; empty ones for
// those that there are none of.
template <typename T>
std::vector<at::Tensor> make_pieces(const DeviceSetup<T>& setup, const Parameters& parameters,
                                    const GradientPlaces& places, const TileLayout& layout,
                                    GradientPieces<T>& pieces) {
  std::vector<at::Tensor> gradients;
  const auto add = [&](int64_t which, int64_t place, int64_t rows, int64_t row_stride,
                       int64_t columns, int64_t column_stride) {
    const std::optional<at::Tensor> parameter = parameters.get(which);
    gradients.push_back(
        setup.empty(parameter.has_value() ? parameter->sizes() : at::IntArrayRef{0}));
    if (!parameter.has_value()) return;
    T* const out = mutable_values<T>(gradients.back());
    pieces.piece[pieces.count++] = {pieces.total, rows,          columns, place,
                                    row_stride,   column_stride, out};
    pieces.total += rows * columns;
  };
  const auto& field = setup.solve.field;
  for (int l = 0; l < field.layers; ++l) {
    const auto& layer = field.layer[l];
    const int64_t first = l * int64_t(kPerLayer), features = field.time_features;
    add(first, places.weight[l], layer.out, 1, layer.in, layout.weight_stride[l]);
    add(first + 1, places.bias[l], layer.out, 1, 1, 0);
    add(first + 2, places.gate_weight[l], layer.out, 1, features, layer.out);
    add(first + 3, places.gate_bias[l], layer.out, 1, 1, 0);
    add(first + 4, places.shift_weight[l], layer.out, 1, features, layer.out);
  }
  return gradients;
}

// The accepted steps: of all samples, or, with `previous` and `newest`, of each.
struct Tape {
  const at::Tensor& times;
  const at::Tensor& states;
  const at::Tensor* previous;
  const at::Tensor* newest;
};

template <typename T>
GradientResult gradient_cuda(const DeviceSetup<T>& setup, const at::Tensor& z_bar,
                             const std::optional<at::Tensor>& extras_bar,
                             const Parameters& parameters, const Tape& tape) {
  const cudaStream_t stream = current_stream();
  TilePlan plan;
  C10_CUDA_CHECK(plan_gradient(setup.solve, setup.batch, &plan));
  MlpGradientParams<T> p = {};
  p.tile = setup.tile_solve(plan);
  p.places = gradient_places(setup.solve.field);
  const at::Tensor bar = z_bar.contiguous();
  const at::Tensor times = tape.times.contiguous(), states = tape.states.contiguous();
  at::Tensor extras;
  if (extras_bar.has_value() && setup.extras > 0) {
    extras = extras_bar->contiguous();
    TORCH_CHECK(extras.sizes() == at::IntArrayRef({setup.extras, setup.batch}) &&
                    extras.scalar_type() == dtype_of<T>(),
                "extras_bar must be [", setup.extras, ", ", setup.batch, "] of ", dtype_of<T>(),
                ", got ", extras.sizes(), " of ", extras.scalar_type());
    p.extras_bar = values<T>(extras);
  }
  const at::Tensor x_bar = at::empty_like(bar);
  const at::Tensor sums = setup.empty({plan.blocks, p.places.numbers});
  const at::Tensor k =
      setup.empty({plan.blocks, 1 + 2 * setup.tableau.stages, setup.rows, plan.layout.samples});
  at::Tensor context_bar = setup.empty({0});
  if (setup.solve.context != nullptr) {
    context_bar = at::zeros({setup.batch, setup.solve.field.layer[0].out}, setup.options);
    p.context_bar = mutable_values<T>(context_bar);
  }
  p.times = times.const_data_ptr<double>();
  p.states = values<T>(states);
  p.steps = times.size(0);
  at::Tensor previous, newest;
  if (tape.previous != nullptr) {
    previous = tape.previous->contiguous();
    newest = tape.newest->contiguous();
    p.previous = previous.const_data_ptr<int64_t>();
    p.newest = newest.const_data_ptr<int64_t>();
  }
  p.z_bar = values<T>(bar);
  p.k = mutable_values<T>(k);
  p.sums = mutable_values<T>(sums);
  p.x_bar = mutable_values<T>(x_bar);
  auto gradients = make_pieces(setup, parameters, p.places, plan.layout, p.pieces);
  C10_CUDA_CHECK(launch_mlp_gradient(p, plan, stream));
  return {x_bar, context_bar, gradients, setup.doubles({0, 2})};
}

GradientResult backward(const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
                        const MlpArguments& arguments, const Tape& tape, bool need_times) {
  TORCH_CHECK(!need_times, "need_times: a GPU's solve has no gradients of times");
  check_cuda(tape.times, "times");
  check_cuda(tape.states, "states");
  if (extras_bar.has_value()) check_cuda(*extras_bar, "extras_bar");
  GradientResult result;
  const CUDAGuard guard(z_bar.device());
  AT_DISPATCH_FLOATING_TYPES(z_bar.scalar_type(), "mlp_backward", [&] {
    const DeviceSetup<scalar_t> setup(z_bar, arguments, tape.previous != nullptr);
    result = gradient_cuda(setup, z_bar, extras_bar, arguments.parameters, tape);
  });
  return result;
}

GradientResult mlp_solve_backward_cuda(
    const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& keys,
    at::IntArrayRef noise, const std::optional<at::Tensor>& context, const Parameters& parameters,
    std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
    const at::Tensor& times, at::TensorList states, at::TensorList kept, bool need_times) {
  TORCH_CHECK(kept.empty() && states.size() == 1 && states[0].dim() == 3 && times.dim() == 2 &&
                  states[0].size(0) == times.size(0) && states[0].size(1) == z_bar.size(0) &&
                  states[0].size(2) == z_bar.size(1) &&
                  states[0].scalar_type() == z_bar.scalar_type() && times.size(0) > 0 &&
                  times.size(1) == 3 && times.scalar_type() == at::kDouble,
              "states and times must be a GPU's tape of a solve from ", z_bar.sizes());
  return backward(z_bar, extras_bar,
                  {probe, keys, noise, context, parameters, method, kind, weights},
                  {times, states[0], nullptr, nullptr}, need_times);
}

GradientResult mlp_samples_backward_cuda(
    const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& keys,
    at::IntArrayRef noise, const std::optional<at::Tensor>& context, const Parameters& parameters,
    std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
    const at::Tensor& times, const at::Tensor& states, const at::Tensor& previous,
    const at::Tensor& newest, bool need_times) {
  TORCH_CHECK(times.dim() == 2 && times.size(0) > 0 && times.size(1) == 4 &&
                  times.scalar_type() == at::kDouble && states.dim() == 2 &&
                  states.size(0) == times.size(0) && states.size(1) == z_bar.size(1) &&
                  states.scalar_type() == z_bar.scalar_type() &&
                  previous.numel() == times.size(0) && newest.numel() == z_bar.size(0) &&
                  previous.scalar_type() == at::kLong && newest.scalar_type() == at::kLong,
              "times, states, previous and newest must be a GPU's tape of a solve from ",
              z_bar.sizes());
  check_cuda(previous, "previous");
  check_cuda(newest, "newest");
  return backward(z_bar, extras_bar,
                  {probe, keys, noise, context, parameters, method, kind, weights},
                  {times, states, &previous, &newest}, need_times);
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) {
  m.impl("mlp_solve_backward", mlp_solve_backward_cuda);
  m.impl("mlp_samples_backward", mlp_samples_backward_cuda);
}

}  // namespace pycnf
