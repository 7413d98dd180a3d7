// The fused engine's solve with steps of the samples' own on a GPU: one launch, for networks that fit
// into the shared memory of a multiprocessor.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/mlp_device.h"
#include "torch/mlp_report.h"

namespace pycnf {
namespace {

// Rows of the tape that there is room for at first, for each sample. Where they do not suffice the
// solve is made again, with as many as it took.
constexpr int64_t kFirstRows = 16;

using Solution =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
Solution samples_cuda(const DeviceSetup<T>& setup, const at::Tensor& x, double start, double end,
                      const StepControl& control, bool taped) {
  const int64_t features = setup.solve.field.features, batch = setup.batch;
  const cudaStream_t stream = current_stream();
  check_not_capturing(stream);
  TilePlan plan;
  C10_CUDA_CHECK(plan_samples(setup.solve, batch, &plan));
  MlpSamplesParams<T> p = {};
  p.tile = setup.tile_solve(plan);
  const at::Tensor given = x.contiguous();
  const at::Tensor z = at::empty_like(given);
  const at::Tensor extras = setup.empty({setup.extras, batch});
  const at::Tensor scratch =
      setup.empty({plan.blocks, kSlabs + setup.tableau.stages, setup.rows, plan.layout.samples});
  const auto whole = setup.options.dtype(at::kLong);
  const at::Tensor report =
      at::empty({kSamplesReportNumbers}, at::TensorOptions(at::kDouble).pinned_memory(true));
  volatile double* const told = report.template mutable_data_ptr<double>();
  p.x = values<T>(given);
  p.z = mutable_values<T>(z);
  p.extras = mutable_values<T>(extras);
  p.scratch = mutable_values<T>(scratch);
  p.rule = setup.rule(control);
  p.start = start;
  p.end = end;
  p.rtol = T(control.rtol);
  p.atol = T(control.atol);
  p.report = on_device(report);
  const at::Tensor counts = at::empty({int64_t(sizeof(SampleCounts) / sizeof(int64_t))}, whole);
  p.counts = reinterpret_cast<SampleCounts*>(counts.template mutable_data_ptr<int64_t>());
  at::Tensor times, states, previous, newest;
  int64_t capacity = kFirstRows * batch;
  while (true) {
    // Zeros every time: blocks count in it.
    C10_CUDA_CHECK(cudaMemsetAsync(p.counts, 0, sizeof(SampleCounts), stream));
    if (taped) {
      times = setup.doubles({capacity, 4});
      states = setup.empty({capacity, features});
      previous = at::empty({capacity}, whole);
      newest = at::empty({batch}, whole);
      p.times = times.template mutable_data_ptr<double>();
      p.states = mutable_values<T>(states);
      p.previous = previous.template mutable_data_ptr<int64_t>();
      p.newest = newest.template mutable_data_ptr<int64_t>();
      p.capacity = capacity;
    }
    told[1] = 0;
    C10_CUDA_CHECK(launch_mlp_samples(p, plan, stream));
    wait_for_report(told, stream);
    if (!taped || int64_t(told[5]) <= capacity) break;
    capacity = int64_t(told[5]);
    times = states = previous = at::Tensor();  // not both at a time
  }
  Report result;
  result.rejected = int64_t(told[0]);
  result.accepted = int64_t(told[3]);
  result.evaluations = int64_t(told[4]);
  if (told[2] != 0) result.status = Status::kUnderflow;
  if (!taped) {
    return {z,
            extras,
            result.tensor(),
            setup.doubles({0, 4}),
            setup.empty({0, features}),
            at::empty({0}, whole),
            at::empty({0}, whole)};
  }
  const int64_t rows = int64_t(told[5]);
  return {z,
          extras,
          result.tensor(),
          times.slice(0, 0, rows),
          states.slice(0, 0, rows),
          previous.slice(0, 0, rows),
          newest};
}

Solution mlp_samples_cuda(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                          const std::optional<at::Tensor>& keys, at::IntArrayRef noise,
                          const std::optional<at::Tensor>& context, const Parameters& parameters,
                          std::string_view method, at::IntArrayRef kind,
                          at::ArrayRef<double> weights, double start, double end,
                          at::ArrayRef<double> control, bool taped) {
  Solution solution;
  const CUDAGuard guard(x.device());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_samples", [&] {
    const DeviceSetup<scalar_t> setup(
        x, {probe, keys, noise, context, parameters, method, kind, weights}, true);
    TORCH_CHECK(setup.tableau.adaptive, "method ", method, " has no steps of the samples' own");
    solution = samples_cuda(setup, x, start, end, read_control(control), taped);
  });
  return solution;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) { m.impl("mlp_samples", mlp_samples_cuda); }

}  // namespace pycnf
