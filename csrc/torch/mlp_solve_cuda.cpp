// The fused engine's solve with steps shared by the batch on a GPU: one launch, for networks that
// fit into the shared memory of a multiprocessor.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "cuda/kernels.h"
#include "torch/mlp_device.h"
#include "torch/mlp_report.h"

namespace pycnf {
namespace {

// Room for all the steps that a solve may take is made if it is no more than this; else for as many
// as that, or these few, and where they do not suffice the solve is made again with room for more.
constexpr int64_t kTapeBytes = 32 << 20;
constexpr int64_t kFirstCapacity = 16, kGrowth = 4;

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
  p.rule = setup.rule(control);
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
    capacity = std::min(std::max(most, kFirstCapacity), control.max_num_steps);
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
    times = states = at::Tensor();  // not both at a time
    for (int i = 0; i < kFlowReportNumbers; ++i) told[i] = 0;
  }
  const auto result =
      report_of(report.const_data_ptr<double>(), setup.tableau, adaptive, control.first_step != 0);
  if (!taped) return {z, extras, result.tensor(), setup.doubles({0, 3}), {}, {}};
  states = states.slice(0, 0, result.accepted);
  // What was not needed is free now, and not after the gradient.
  if (2 * states.nbytes() < states.storage().nbytes() && states.storage().nbytes() > kTapeBytes) {
    states = states.clone();
  }
  return {z, extras, result.tensor(), times.slice(0, 0, result.accepted), {states}, {}};
}

Solution mlp_solve_cuda(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                        const std::optional<at::Tensor>& keys, at::IntArrayRef noise,
                        const std::optional<at::Tensor>& context, const Parameters& parameters,
                        std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
                        double start, double end, at::ArrayRef<double> control,
                        at::ArrayRef<double> grid, int64_t keep_bytes) {
  Solution solution;
  const CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve", [&] {
    const DeviceSetup<scalar_t> setup(
        x, {probe, keys, noise, context, parameters, method, kind, weights}, false);
    // Without tolerances norms are of the plain numbers: finite or not.
    StepControl steps = {.atol = 1};
    if (setup.tableau.adaptive) steps = read_control(control);
    solution = solve_cuda(setup, x, start, end, steps, grid, keep_bytes >= 0);
  });
  return solution;
}

bool mlp_solve_fits_cuda(const at::Tensor& x, at::IntArrayRef noise, const Parameters& parameters,
                         at::IntArrayRef kind, bool own_times) {
  bool fits = false;
  const CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve_fits", [&] {
    const std::optional<at::Tensor> none;
    // Probes that are drawn take the most room.
    const std::optional<at::Tensor> keys =
        noise.empty() ? none : at::empty({x.size(0)}, x.options().dtype(at::kLong));
    const DeviceSetup<scalar_t> setup(
        x, {none, keys, noise, none, parameters, "euler", kind, {1., 0., 0.}}, own_times);
    TilePlan solve, gradient;
    C10_CUDA_CHECK(own_times ? plan_samples(setup.solve, setup.batch, &solve)
                             : plan_solve(setup.solve, setup.batch, &solve));
    C10_CUDA_CHECK(plan_gradient(setup.solve, setup.batch, &gradient));
    fits = solve.tiles > 0 && gradient.tiles > 0;
  });
  return fits;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) {
  m.impl("mlp_solve", mlp_solve_cuda);
  m.impl("mlp_solve_fits", mlp_solve_fits_cuda);
}

}  // namespace pycnf
