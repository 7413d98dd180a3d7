// The fused engine's solve with steps shared by the batch, and its discrete gradient, on a GPU: a
// launch each, for networks that fit into the shared memory of a multiprocessor.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <chrono>
#include <thread>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/mlp_solve.h"
#include "torch/cuda_device.h"
#include "torch/interrupt.h"
#include "torch/mlp_arguments.h"
#include "torch/mlp_report.h"

namespace pycnf {
namespace {

// Room for all the steps that a solve may take is made if it is no more than this; else for some
// steps, and where they do not suffice the solve is made again with room for more.
constexpr int64_t kTapeBytes = 32 << 20;
constexpr int64_t kFirstCapacity = 64, kGrowth = 4;

// One call's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class DeviceSetup {
 public:
  DeviceSetup(const at::Tensor& x, const MlpArguments& arguments)
      : options(x.options().requires_grad(std::nullopt)), batch(x.size(0)) {
    check_cuda(x, "x");
    for (int64_t i = 0; i < int64_t(arguments.parameters.size()); ++i) {
      const std::optional<at::Tensor> parameter = arguments.parameters.get(i);
      if (parameter.has_value()) check_cuda(*parameter, "parameters");
    }
    if (arguments.context.has_value()) check_cuda(*arguments.context, "context");
    if (arguments.probe.has_value()) check_cuda(*arguments.probe, "probe");
    read_solve(arguments, x, solve, tensors_, [&](const at::Tensor& parameter, int64_t count) {
      tensors_.push_back(count == 1 ? parameter.reshape({-1}).contiguous()
                                    : parameter.t().contiguous());
      return values<T>(tensors_.back());
    });
    tableau = *solve.tableau;
    solve.tableau = nullptr;
    probe_ = read_probe(arguments);
    if (probe_.defined()) solve.probe = values<T>(probe_);
    context_ = read_context(arguments, x, solve);
    if (context_.defined()) solve.context = values<T>(context_);
    rows = state_rows(solve);
    extras = extra_rows(solve);
  }

  TileSolve<T> tile_solve(const TilePlan& plan) const {
    TORCH_CHECK(plan.tiles > 0,
                "the network does not fit into the GPU's shared memory; mlp_solve_fits tells");
    return {solve, tableau, plan.layout, batch, plan.tiles};
  }

  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  at::Tensor doubles(at::IntArrayRef sizes) const {
    return at::empty(sizes, options.dtype(at::kDouble));
  }

  MlpSolve<T> solve = {};
  Tableau tableau;
  at::TensorOptions options;
  int64_t batch;
  int64_t rows = 0;
  int64_t extras = 0;

 private:
  std::vector<at::Tensor> tensors_;
  at::Tensor probe_, context_;
};

// Waits until the kernel has told how it ended. It tells in memory of the host, so no call of CUDA's
// stops the host; every now and then one asks whether the kernel is still at work.
void wait_for_report(const volatile double* report, cudaStream_t stream) {
  using Clock = std::chrono::steady_clock;
  auto next = Clock::now() + std::chrono::milliseconds(1);
  while (report[1] == 0) {
    std::this_thread::yield();
    if (Clock::now() < next) continue;
    check_interrupt();
    const cudaError_t state = cudaStreamQuery(stream);
    if (state != cudaErrorNotReady) {
      C10_CUDA_CHECK(state);
      TORCH_CHECK(report[1] != 0, "the GPU has stopped amid a solve");
    }
    next = Clock::now() + std::chrono::milliseconds(1);
  }
}

void check_not_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  TORCH_CHECK(status == cudaStreamCaptureStatusNone,
              "a solve of the fused engine cannot be captured in a CUDA graph: the host reads how "
              "many steps it took");
}

// What the host says of a solve in the words of the CPU's, but for where and why it failed: the
// solver with the host in its loop finds that out.
Report report_of(const double* told, const Tableau& tableau, bool adaptive, bool given_first_step) {
  Report report;
  const int64_t stages = tableau.stages - 1;
  report.accepted = int64_t(told[3]);
  report.rejected = adaptive ? int64_t(told[0]) - report.accepted : 0;
  report.step_size = told[4];
  report.evaluations = (report.accepted + report.rejected) * stages + 1;
  if (adaptive && !given_first_step) ++report.evaluations;
  if (!tableau.solution_is_last_stage) report.evaluations += report.accepted - 1;
  if (told[2] != 0) report.status = Status::kUnderflow;
  return report;
}

using Solution = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                            std::vector<at::Tensor>>;

template <typename T>
Solution solve_cuda(const DeviceSetup<T>& setup, const at::Tensor& x, double start, double end,
                    const StepControl& control, at::ArrayRef<double> grid, bool taped) {
  const bool adaptive = setup.tableau.adaptive;
  const int64_t features = setup.solve.field.features;
  const cudaStream_t stream = current_stream();
  check_not_capturing(stream);
  TilePlan plan;
  C10_CUDA_CHECK(plan_solve(setup.solve, setup.batch, &plan));
  MlpSolveParams<T> p = {};
  p.tile = setup.tile_solve(plan);
  const int64_t tile_numbers = plan.tiles * setup.rows * plan.layout.samples;
  const at::Tensor given = x.contiguous();
  const at::Tensor z = at::empty_like(given);
  const at::Tensor extras = setup.empty({setup.extras, setup.batch});
  const at::Tensor y = setup.empty({2 * tile_numbers});
  const at::Tensor k = setup.empty({setup.tableau.stages * tile_numbers});
  const at::Tensor partials =
      setup.doubles({2 * plan.tiles * int64_t(sizeof(TilePartial) / sizeof(double))});
  at::Tensor times_of_grid;
  p.x = values<T>(given);
  p.z = mutable_values<T>(z);
  p.extras = mutable_values<T>(extras);
  p.y = mutable_values<T>(y);
  p.k = mutable_values<T>(k);
  p.partials = reinterpret_cast<TilePartial*>(partials.mutable_data_ptr<double>());
  p.rule.control = control;
  p.rule.order = setup.tableau.order;
  p.rule.nodes = setup.tableau.stages;
  std::copy_n(setup.tableau.c, setup.tableau.stages, p.rule.c);
  p.start = start;
  p.end = end;
  p.rtol = T(control.rtol);
  p.atol = T(control.atol);
  int64_t capacity = int64_t(grid.size()) - 1;
  if (!adaptive) {
    TORCH_CHECK(grid.size() >= 2, "grid must have at least two times, got ", grid.size());
    times_of_grid = setup.doubles({int64_t(grid.size())});
    C10_CUDA_CHECK(launch_store_values(grid.data(), int64_t(grid.size()),
                                       times_of_grid.mutable_data_ptr<double>(), stream));
    p.grid = times_of_grid.const_data_ptr<double>();
    p.grid_times = int64_t(grid.size());
  } else {
    const int64_t most = kTapeBytes / (setup.batch * features * int64_t(sizeof(T)));
    capacity = control.max_num_steps <= most ? control.max_num_steps
                                             : std::min(kFirstCapacity, control.max_num_steps);
  }
  const at::Tensor report =
      at::zeros({kFlowReportNumbers}, at::TensorOptions(at::kDouble).pinned_memory(true));
  volatile double* const told = report.mutable_data_ptr<double>();
  p.report = on_device(report);
  at::Tensor times, states;
  while (true) {
    if (taped) {
      times = setup.doubles({capacity, 3});
      states = setup.empty({capacity, setup.batch, features});
      p.times = times.mutable_data_ptr<double>();
      p.states = mutable_values<T>(states);
      p.capacity = capacity;
    }
    C10_CUDA_CHECK(launch_mlp_solve(p, plan, stream));
    wait_for_report(told, stream);
    if (told[2] != double(int(FlowFailure::kFullTape))) break;
    capacity = std::min(kGrowth * capacity, control.max_num_steps);
    for (int i = 0; i < kFlowReportNumbers; ++i) told[i] = 0;
  }
  const auto result =
      report_of(report.const_data_ptr<double>(), setup.tableau, adaptive, control.first_step != 0);
  if (!taped) return {z, extras, result.tensor(), setup.doubles({0, 3}), {}, {}};
  return {z,
          extras,
          result.tensor(),
          times.slice(0, 0, result.accepted),
          {states.slice(0, 0, result.accepted)},
          {}};
}

Solution mlp_solve_cuda(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                        const std::optional<at::Tensor>& context, const Parameters& parameters,
                        std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
                        double start, double end, at::ArrayRef<double> control,
                        at::ArrayRef<double> grid, int64_t keep_bytes) {
  Solution solution;
  const CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve", [&] {
    const DeviceSetup<scalar_t> setup(x, {probe, context, parameters, method, kind, weights});
    // Without tolerances norms are of the plain numbers: finite or not.
    StepControl steps = {.atol = 1};
    if (setup.tableau.adaptive) steps = read_control(control);
    solution = solve_cuda(setup, x, start, end, steps, grid, keep_bytes >= 0);
  });
  return solution;
}

// ---- gradient -----------------------------------------------------------------------------------

using GradientResult = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor>;

// Where each parameter's gradient is in the sums, and the tensors that it goes to; empty ones for
// those that there are none of.
template <typename T>
std::vector<at::Tensor> gather_pieces(const DeviceSetup<T>& setup, const Parameters& parameters,
                                      const GradientPlaces& places, const TileLayout& layout,
                                      GatherParams<T>& gather) {
  std::vector<at::Tensor> gradients;
  const auto add = [&](int64_t which, int64_t place, int64_t rows, int64_t row_stride,
                       int64_t columns, int64_t column_stride) {
    const std::optional<at::Tensor> parameter = parameters.get(which);
    gradients.push_back(
        setup.empty(parameter.has_value() ? parameter->sizes() : at::IntArrayRef{0}));
    if (!parameter.has_value()) return;
    T* const out = mutable_values<T>(gradients.back());
    gather.piece[gather.pieces++] = {gather.total, rows,          columns, place,
                                     row_stride,   column_stride, out};
    gather.total += rows * columns;
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

template <typename T>
GradientResult gradient_cuda(const DeviceSetup<T>& setup, const at::Tensor& z_bar,
                             const std::optional<at::Tensor>& extras_bar,
                             const Parameters& parameters, const at::Tensor& times,
                             const at::Tensor& states) {
  const cudaStream_t stream = current_stream();
  TilePlan plan;
  C10_CUDA_CHECK(plan_gradient(setup.solve, setup.batch, &plan));
  MlpGradientParams<T> p = {};
  p.tile = setup.tile_solve(plan);
  p.places = gradient_places(setup.solve.field);
  const at::Tensor bar = z_bar.contiguous();
  const auto steps = times.contiguous(), starts = states.contiguous();
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
  p.times = steps.const_data_ptr<double>();
  p.states = values<T>(starts);
  p.steps = steps.size(0);
  p.z_bar = values<T>(bar);
  p.k = mutable_values<T>(k);
  p.sums = mutable_values<T>(sums);
  p.x_bar = mutable_values<T>(x_bar);
  C10_CUDA_CHECK(launch_mlp_gradient(p, plan, stream));

  GatherParams<T> gather = {};
  gather.sums = p.sums;
  gather.blocks = plan.blocks;
  gather.numbers = p.places.numbers;
  auto gradients = gather_pieces(setup, parameters, p.places, plan.layout, gather);
  C10_CUDA_CHECK(launch_gather_gradients(gather, stream));
  return {x_bar, context_bar, gradients, setup.doubles({0, 2})};
}

GradientResult mlp_solve_backward_cuda(const at::Tensor& z_bar,
                                       const std::optional<at::Tensor>& extras_bar,
                                       const std::optional<at::Tensor>& probe,
                                       const std::optional<at::Tensor>& context,
                                       const Parameters& parameters, std::string_view method,
                                       at::IntArrayRef kind, at::ArrayRef<double> weights,
                                       const at::Tensor& times, at::TensorList states,
                                       at::TensorList kept, bool need_times) {
  TORCH_CHECK(!need_times, "need_times: a GPU's solve has no gradients of times");
  TORCH_CHECK(kept.empty() && states.size() == 1 && states[0].dim() == 3 && times.dim() == 2 &&
                  states[0].size(0) == times.size(0) && states[0].size(1) == z_bar.size(0) &&
                  states[0].size(2) == z_bar.size(1) &&
                  states[0].scalar_type() == z_bar.scalar_type() && times.size(0) > 0 &&
                  times.size(1) == 3 && times.scalar_type() == at::kDouble,
              "states and times must be a GPU's tape of a solve from ", z_bar.sizes());
  check_cuda(times, "times");
  check_cuda(states[0], "states");
  if (extras_bar.has_value()) check_cuda(*extras_bar, "extras_bar");
  GradientResult result;
  const CUDAGuard guard(z_bar.device());
  AT_DISPATCH_FLOATING_TYPES(z_bar.scalar_type(), "mlp_solve_backward", [&] {
    const DeviceSetup<scalar_t> setup(z_bar, {probe, context, parameters, method, kind, weights});
    result = gradient_cuda(setup, z_bar, extras_bar, parameters, times, states[0]);
  });
  return result;
}

bool mlp_solve_fits_cuda(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                         const Parameters& parameters, at::IntArrayRef kind) {
  bool fits = false;
  const CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve_fits", [&] {
    const std::optional<at::Tensor> none;
    const DeviceSetup<scalar_t> setup(x, {probe, none, parameters, "euler", kind, {1., 0., 0.}});
    TilePlan solve, gradient;
    C10_CUDA_CHECK(plan_solve(setup.solve, setup.batch, &solve));
    C10_CUDA_CHECK(plan_gradient(setup.solve, setup.batch, &gradient));
    fits = solve.tiles > 0 && gradient.tiles > 0;
  });
  return fits;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) {
  m.impl("mlp_solve", mlp_solve_cuda);
  m.impl("mlp_solve_backward", mlp_solve_backward_cuda);
  m.impl("mlp_solve_fits", mlp_solve_fits_cuda);
}

}  // namespace pycnf
