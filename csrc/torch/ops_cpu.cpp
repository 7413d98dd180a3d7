// CPU implementations: check, allocate, split over threads, call the kernels of this machine's
// instruction set.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/EmptyTensor.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include "torch/arguments.h"
#include "torch/cpu_kernels.h"

namespace pycnf {
namespace {

// Elements per partial sum of a norm; a multiple of the kernels' block.
constexpr int64_t kNormChunk = 8192;

template <typename Body>
std::vector<NormPartial> norm_partials(const std::vector<Range>& ranges, const Body& body) {
  std::vector<NormPartial> partials(ranges.size());
  at::parallel_for(0, int64_t(ranges.size()), kGrain / kNormChunk, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) partials[r] = body(ranges[r].begin, ranges[r].end);
  });
  return partials;
}

at::Tensor pair_of(double first, double second) {
  auto result = at::empty({2}, at::kDouble);
  result.data_ptr<double>()[0] = first;
  result.data_ptr<double>()[1] = second;
  return result;
}

at::Tensor rk_stage_cpu(const at::Tensor& y0, const at::Tensor& k, bool flip, at::TensorList fresh,
                        at::ArrayRef<double> weights, double h) {
  check_state(y0, "y0");
  const Rows rows(k, y0, flip);
  TORCH_CHECK(!weights.empty(), "weights must not be empty");
  auto out = at::empty_like(y0);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "rk_stage", [&] {
    const auto p = stage_params<scalar_t>(y0, rows, fresh, weights, h, out);
    const auto& table = cpu_kernels<scalar_t>();
    at::parallel_for(0, y0.numel(), kGrain,
                     [&](int64_t begin, int64_t end) { table.stage(p, begin, end); });
  });
  return out;
}

at::Tensor rk_finish_cpu(const at::Tensor& y0, const at::Tensor& k, bool flip, at::TensorList fresh,
                         const at::Tensor& y1, at::ArrayRef<double> solution,
                         at::ArrayRef<double> error, double h, const at::Tensor& rtol,
                         const at::Tensor& atol, at::IntArrayRef segments,
                         const std::optional<at::Tensor>& ratio) {
  check_state(y0, "y0");
  check_like(y1, y0, "y1");
  if (ratio.has_value()) check_like(*ratio, y0, "ratio");
  const Rows rows(k, y0, flip);
  const auto ranges = norm_ranges(segments, y0.numel(), kNormChunk);
  std::vector<NormPartial> partials;
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "rk_finish", [&] {
    const auto p =
        finish_params<scalar_t>(y0, rows, fresh, y1, solution, error, h, rtol, atol, ratio);
    const auto& table = cpu_kernels<scalar_t>();
    partials = norm_partials(
        ranges, [&](int64_t begin, int64_t end) { return table.finish(p, begin, end); });
  });
  int64_t nonfinite = 0;
  for (const auto& partial : partials) nonfinite += partial.nonfinite;
  return pair_of(largest_rms(ranges, partials, segments)[0], nonfinite == 0 ? 1. : 0.);
}

double value_of(const at::Tensor& h, const at::Tensor& y0) {
  check_step(h, y0);
  return h.reshape({-1})[0].item<double>();
}

at::Tensor attempt_stage_cpu(const at::Tensor& y0, const at::Tensor& k, at::TensorList fresh,
                             at::ArrayRef<double> weights, const at::Tensor& h) {
  return rk_stage_cpu(y0, k, /*flip=*/false, fresh, weights, value_of(h, y0));
}

at::Tensor attempt_finish_cpu(const at::Tensor& y0, const at::Tensor& k, at::TensorList fresh,
                              const at::Tensor& y1, at::ArrayRef<double> solution,
                              at::ArrayRef<double> error, const at::Tensor& h,
                              const at::Tensor& rtol, const at::Tensor& atol,
                              at::IntArrayRef segments) {
  return rk_finish_cpu(y0, k, /*flip=*/false, fresh, y1, solution, error, value_of(h, y0), rtol,
                       atol, segments, std::nullopt);
}

void rk_interpolate_cpu(const at::Tensor& y0, const at::Tensor& y1, const at::Tensor& k, bool flip,
                        at::ArrayRef<double> middle, double h, at::ArrayRef<double> x,
                        const at::Tensor& out) {
  check_interpolate(y0, y1, x, out);
  const Rows rows(k, y0, flip);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "rk_interpolate", [&] {
    const auto points = at::tensor(x, y0.options());
    const auto p = interpolate_params<scalar_t>(y0, y1, rows, middle, h, points, out);
    const auto& table = cpu_kernels<scalar_t>();
    at::parallel_for(0, y0.numel(), kGrain,
                     [&](int64_t begin, int64_t end) { table.interpolate(p, begin, end); });
  });
}

at::Tensor rk_initial_norms_cpu(const at::Tensor& y0, const at::Tensor& f0,
                                const std::optional<at::Tensor>& f1, const at::Tensor& rtol,
                                const at::Tensor& atol, at::IntArrayRef segments) {
  check_state(y0, "y0");
  check_like(f0, y0, "f0");
  if (f1.has_value()) check_like(*f1, y0, "f1");
  const auto ranges = norm_ranges(segments, y0.numel(), kNormChunk);
  std::vector<NormPartial> partials;
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "rk_initial_norms", [&] {
    const auto p = initial_params<scalar_t>(y0, f0, f1, rtol, atol);
    const auto& table = cpu_kernels<scalar_t>();
    partials = norm_partials(
        ranges, [&](int64_t begin, int64_t end) { return table.initial(p, begin, end); });
  });
  const auto norms = largest_rms(ranges, partials, segments);
  return pair_of(norms[0], norms[1]);
}

at::Tensor rk_combine_cpu(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights,
                          double h, const std::optional<at::Tensor>&, bool ordered) {
  const auto y0 = y.contiguous();
  const auto rows = combine_rows(y0, k, weights);
  auto out = at::empty_like(y0);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "rk_combine", [&] {
    const auto p = combine_params<scalar_t>(y0, rows, weights, h, ordered, out);
    const auto& table = cpu_kernels<scalar_t>();
    at::parallel_for(0, y0.numel(), kGrain,
                     [&](int64_t begin, int64_t end) { table.stage(p, begin, end); });
  });
  return out;
}

at::Tensor broyden_step_cpu(const at::Tensor& residual, at::TensorList steps) {
  check_state(residual, "residual");
  for (const auto& step : steps) check_like(step, residual, "steps");
  auto out = at::empty_like(residual);
  AT_DISPATCH_FLOATING_TYPES(residual.scalar_type(), "broyden_step", [&] {
    std::vector<const scalar_t*> rows;
    for (const auto& step : steps) rows.push_back(step.const_data_ptr<scalar_t>());
    cpu_kernels<scalar_t>().broyden_step({rows.data(), int64_t(rows.size()),
                                          residual.const_data_ptr<scalar_t>(),
                                          out.data_ptr<scalar_t>(), residual.numel()});
  });
  return out;
}

// Any device: one copy to it, and a view per value.
std::vector<at::Tensor> time_tensors(at::ArrayRef<double> values, at::ScalarType dtype,
                                     at::Device device) {
  if (!device.is_cpu()) {
    return at::tensor(values, at::kDouble).to(device, dtype).unbind();
  }
  std::vector<at::Tensor> result;
  result.reserve(values.size());
  for (const double value : values) {
    auto t = at::detail::empty_cpu({}, dtype);
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, dtype, "time_tensors",
                                    [&] { *t.mutable_data_ptr<scalar_t>() = scalar_t(value); });
    result.push_back(std::move(t));
  }
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CompositeExplicitAutograd, m) { m.impl("time_tensors", time_tensors); }

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("rk_stage", rk_stage_cpu);
  m.impl("rk_finish", rk_finish_cpu);
  m.impl("attempt_stage", attempt_stage_cpu);
  m.impl("attempt_finish", attempt_finish_cpu);
  m.impl("rk_interpolate", rk_interpolate_cpu);
  m.impl("rk_initial_norms", rk_initial_norms_cpu);
  m.impl("rk_combine", rk_combine_cpu);
  m.impl("broyden_step", broyden_step_cpu);
}

}  // namespace pycnf
