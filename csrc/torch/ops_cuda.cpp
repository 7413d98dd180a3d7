// CUDA implementations: check, allocate, guard, launch on the current stream. The host never waits
// here.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <c10/core/TensorOptions.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <torch/library.h>

#include "cuda/kernels.h"
#include "torch/arguments.h"
#include "torch/attempt_plan.h"
#include "torch/cuda_device.h"
#include "torch/find_op.h"
#include "torch/flow_plan.h"
#include "torch/probes.h"

namespace pycnf {

template <>
struct TorchNumber<__half> {
  using Type = at::Half;
};

template <>
struct TorchNumber<__nv_bfloat16> {
  using Type = at::BFloat16;
};

namespace {

// Calls body(stored number, number to compute with) for a state's dtype.
template <typename Body>
void with_storage(at::ScalarType dtype, const Body& body) {
  switch (dtype) {
    case at::kHalf:
      return body(__half(), float());
    case at::kBFloat16:
      return body(__nv_bfloat16(), float());
    default:
      AT_DISPATCH_FLOATING_TYPES(dtype, "rk_*", [&] { body(scalar_t(), scalar_t()); });
  }
}

// What a norm needs in device memory: `scratch` holds the partial sums and, behind them, the table
// of many pieces.
struct Norm {
  NormLayout layout;
  at::Tensor scratch;
  at::Tensor result;  // f64 [2]

  NormPartial* partials() const { return reinterpret_cast<NormPartial*>(scratch.data_ptr()); }
};

Norm prepare_norm(at::IntArrayRef segments, const at::Tensor& y0) {
  const int64_t size = y0.numel();
  Norm norm = {};
  norm.layout.chunk = norm_chunk(size);
  std::vector<NormPiece> pieces;
  int64_t ranges = 0;
  const auto add_piece = [&](int64_t begin, int64_t end, int64_t segment) {
    pieces.push_back({begin, end, int32_t(segment), int32_t(ranges)});
    ranges += ranges_of_piece(begin, end, norm.layout.chunk);
  };
  // An empty segment has an RMS of NaN, which counts in the first place only.
  if (segments.size() >= 2 && segments[0] == segments[1]) add_piece(segments[0], segments[1], 0);
  for (const auto& piece : norm_ranges(segments, size, std::max<int64_t>(1, size))) {
    add_piece(piece.begin, piece.end, piece.segment);
  }
  norm.layout.pieces = int32_t(pieces.size());
  norm.layout.ranges = int32_t(ranges);

  const bool few = pieces.size() <= size_t(kFewPieces);
  const int64_t table_bytes = few ? 0 : int64_t(pieces.size() * sizeof(NormPiece));
  norm.scratch = at::empty({ranges * int64_t(sizeof(NormPartial)) + table_bytes},
                           y0.options().dtype(at::kByte));
  norm.result = at::empty({2}, y0.options().dtype(at::kDouble));
  if (few) {
    std::copy(pieces.begin(), pieces.end(), norm.layout.few);
  } else {
    auto* table = reinterpret_cast<NormPiece*>(norm.partials() + ranges);
    C10_CUDA_CHECK(launch_store_pieces(pieces.data(), norm.layout.pieces, table, current_stream()));
    norm.layout.table = table;
  }
  return norm;
}

at::Tensor rk_stage_cuda(const at::Tensor& y0, const at::Tensor& k, bool flip, at::TensorList fresh,
                         at::ArrayRef<double> weights, double h) {
  check_cuda(y0, "y0");
  check_state(y0, "y0");
  const Rows rows(k, y0, flip);
  TORCH_CHECK(!weights.empty(), "weights must not be empty");
  const CUDAGuard guard(y0.device());
  auto out = at::empty_like(y0);
  with_storage(y0.scalar_type(), [&](auto stored, auto number) {
    const auto p =
        stage_params<decltype(stored), decltype(number)>(y0, rows, fresh, weights, h, out);
    C10_CUDA_CHECK(launch_stage(p, y0.numel(), current_stream()));
  });
  return out;
}

at::Tensor rk_finish_cuda(const at::Tensor& y0, const at::Tensor& k, bool flip,
                          at::TensorList fresh, const at::Tensor& y1, at::ArrayRef<double> solution,
                          at::ArrayRef<double> error, double h, const at::Tensor& rtol,
                          const at::Tensor& atol, at::IntArrayRef segments,
                          const std::optional<at::Tensor>& ratio) {
  check_cuda(y0, "y0");
  check_state(y0, "y0");
  check_like(y1, y0, "y1");
  if (ratio.has_value()) check_like(*ratio, y0, "ratio");
  const Rows rows(k, y0, flip);
  const CUDAGuard guard(y0.device());
  auto norm = prepare_norm(segments, y0);
  with_storage(y0.scalar_type(), [&](auto stored, auto number) {
    const auto p = finish_params<decltype(stored), decltype(number)>(y0, rows, fresh, y1, solution,
                                                                     error, h, rtol, atol, ratio);
    C10_CUDA_CHECK(launch_finish(p, norm.layout, norm.partials(), norm.result.data_ptr<double>(),
                                 current_stream()));
  });
  return norm.result;
}

// ---- steps that the device chooses ---------------------------------------------------------------

at::Tensor attempt_stage_cuda(const at::Tensor& y0, const at::Tensor& k, at::TensorList fresh,
                              at::ArrayRef<double> weights, const at::Tensor& h) {
  check_cuda(y0, "y0");
  check_state(y0, "y0");
  check_step(h, y0);
  const Rows rows(k, y0, /*flip=*/false);
  TORCH_CHECK(!weights.empty(), "weights must not be empty");
  const CUDAGuard guard(y0.device());
  auto out = at::empty_like(y0);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "attempt_stage", [&] {
    auto p = stage_params<scalar_t>(y0, rows, fresh, weights, 1., out);
    p.terms.scale = h.const_data_ptr<scalar_t>();
    C10_CUDA_CHECK(launch_stage(p, y0.numel(), current_stream()));
  });
  return out;
}

at::Tensor attempt_finish_cuda(const at::Tensor& y0, const at::Tensor& k, at::TensorList fresh,
                               const at::Tensor& y1, at::ArrayRef<double> solution,
                               at::ArrayRef<double> error, const at::Tensor& h,
                               const at::Tensor& rtol, const at::Tensor& atol,
                               at::IntArrayRef segments) {
  check_cuda(y0, "y0");
  check_state(y0, "y0");
  check_like(y1, y0, "y1");
  check_step(h, y0);
  const Rows rows(k, y0, /*flip=*/false);
  const CUDAGuard guard(y0.device());
  auto norm = prepare_norm(segments, y0);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "attempt_finish", [&] {
    auto p = finish_params<scalar_t>(y0, rows, fresh, y1, solution, error, 1., rtol, atol, {});
    p.solution.scale = p.error.scale = h.const_data_ptr<scalar_t>();
    C10_CUDA_CHECK(launch_finish(p, norm.layout, norm.partials(), norm.result.data_ptr<double>(),
                                 current_stream()));
  });
  return norm.result;
}

void attempt_control_cuda(at::TensorList tensors, const std::optional<at::Tensor>& norms,
                          std::string_view name, at::ArrayRef<double> rule,
                          at::ArrayRef<double> nodes, at::ScalarType time) {
  const PlanTensors plan(tensors);
  const auto moment = attempt_moment(name);
  check_cuda(plan.attempt, "attempt");
  check_norms(moment, norms);
  if (norms.has_value()) check_cuda(*norms, "norms");
  const CUDAGuard guard(plan.attempt.device());
  with_types(time, plan.times.scalar_type(), [&](auto time_number, auto state_number) {
    using State = decltype(state_number);
    const auto p = attempt_plan<State>(plan, rule, nodes, on_device(plan.report));
    const auto* norm = norms.has_value() ? norms->const_data_ptr<double>() : nullptr;
    C10_CUDA_CHECK(launch_control<decltype(time_number)>(moment, p, norm, current_stream()));
  });
}

void attempt_advance_cuda(at::TensorList tensors, const at::Tensor& y, const at::Tensor& y1,
                          const at::Tensor& k, at::ArrayRef<double> middle,
                          const at::Tensor& solution, at::ScalarType time) {
  const PlanTensors plan(tensors);
  check_cuda(y, "y");
  check_advance(plan, y, y1, solution);
  const Rows rows(k, y, /*flip=*/false);
  const CUDAGuard guard(y.device());
  with_types(time, y.scalar_type(), [&](auto time_number, auto state_number) {
    using State = decltype(state_number);
    AdvanceParams<State> p = {};
    p.attempt = reinterpret_cast<const Attempt*>(plan.attempt.const_data_ptr<double>());
    p.outputs = plan.outputs.const_data_ptr<double>();
    p.y = y.data_ptr<State>();
    p.y1 = y1.const_data_ptr<State>();
    p.first_row = rows.row<State>(0);
    p.last_row = rows.row<State>(rows.stages() - 1);
    p.middle = rows.weighted<State>(middle, 1.);
    p.h = p.middle.scale = plan.h.const_data_ptr<State>() + 1;
    p.solution = solution.data_ptr<State>();
    p.size = y.numel();
    C10_CUDA_CHECK(launch_advance<decltype(time_number)>(p, current_stream()));
  });
}

at::Tensor attempt_combine_cuda(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights,
                                const at::Tensor& h) {
  check_cuda(y, "y");
  check_step(h, y);
  const CUDAGuard guard(y.device());
  const auto y0 = y.contiguous();
  const auto rows = combine_rows(y0, k, weights);
  auto out = at::empty_like(y0);
  AT_DISPATCH_FLOATING_TYPES(y0.scalar_type(), "attempt_combine", [&] {
    auto p = combine_params<scalar_t>(y0, rows, weights, 1., /*ordered=*/false, out);
    p.terms.scale = h.const_data_ptr<scalar_t>();
    C10_CUDA_CHECK(launch_stage(p, y0.numel(), current_stream()));
  });
  return out;
}

void flow_control_cuda(at::TensorList plan, const std::optional<at::Tensor>& norms,
                       std::string_view name, at::ArrayRef<double> rule,
                       at::ArrayRef<double> nodes) {
  const FlowTensors tensors(plan);
  check_cuda(tensors.attempt, "attempt");
  const auto moment = flow_moment(name);
  check_flow_norms(moment, norms);
  if (norms.has_value()) check_cuda(*norms, "norms");
  const CUDAGuard guard(tensors.attempt.device());
  const auto* norm = norms.has_value() ? norms->const_data_ptr<double>() : nullptr;
  AT_DISPATCH_FLOATING_TYPES(tensors.times.scalar_type(), "flow_control", [&] {
    const auto p = flow_plan<scalar_t>(tensors, rule, nodes, on_device(tensors.report));
    C10_CUDA_CHECK(launch_flow_control(moment, p, norm, current_stream()));
  });
}

void flow_advance_cuda(at::TensorList plan, const at::Tensor& y, const at::Tensor& y1,
                       const at::Tensor& k, const at::Tensor& tape) {
  const FlowTensors tensors(plan);
  check_cuda(y, "y");
  check_flow_advance(tensors, y, y1, tape);
  const Rows rows(k, y, /*flip=*/false);
  const CUDAGuard guard(y.device());
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "flow_advance", [&] {
    FlowAdvanceParams<scalar_t> p = {};
    p.attempt = reinterpret_cast<const FlowAttempt*>(tensors.attempt.const_data_ptr<double>());
    p.y = y.data_ptr<scalar_t>();
    p.y1 = y1.const_data_ptr<scalar_t>();
    p.first_row = rows.row<scalar_t>(0);
    p.last_row = rows.row<scalar_t>(rows.stages() - 1);
    p.tape = tape.size(0) > 0 ? tape.data_ptr<scalar_t>() : nullptr;
    p.kept = tape.size(1);
    p.size = y.numel();
    C10_CUDA_CHECK(launch_flow_advance(p, current_stream()));
  });
}

void rk_interpolate_cuda(const at::Tensor& y0, const at::Tensor& y1, const at::Tensor& k, bool flip,
                         at::ArrayRef<double> middle, double h, at::ArrayRef<double> x,
                         const at::Tensor& out) {
  check_cuda(y0, "y0");
  check_interpolate(y0, y1, x, out);
  const Rows rows(k, y0, flip);
  const CUDAGuard guard(y0.device());
  with_storage(y0.scalar_type(), [&](auto stored, auto number) {
    using T = decltype(number);
    const auto points = at::tensor(x, at::device(at::kCPU).dtype<T>());
    const auto p = interpolate_params<decltype(stored), T>(y0, y1, rows, middle, h, points, out);
    C10_CUDA_CHECK(launch_interpolate(p, current_stream()));
  });
}

at::Tensor rk_initial_norms_cuda(const at::Tensor& y0, const at::Tensor& f0,
                                 const std::optional<at::Tensor>& f1, const at::Tensor& rtol,
                                 const at::Tensor& atol, at::IntArrayRef segments) {
  check_cuda(y0, "y0");
  check_state(y0, "y0");
  check_like(f0, y0, "f0");
  if (f1.has_value()) check_like(*f1, y0, "f1");
  const CUDAGuard guard(y0.device());
  auto norm = prepare_norm(segments, y0);
  with_storage(y0.scalar_type(), [&](auto stored, auto number) {
    const auto p = initial_params<decltype(stored), decltype(number)>(y0, f0, f1, rtol, atol);
    C10_CUDA_CHECK(launch_initial(p, norm.layout, norm.partials(), norm.result.data_ptr<double>(),
                                  current_stream()));
  });
  return norm.result;
}

at::Tensor rk_combine_cuda(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights,
                           double h, const std::optional<at::Tensor>&, bool ordered) {
  check_cuda(y, "y");
  const CUDAGuard guard(y.device());
  const auto y0 = y.contiguous();
  const auto rows = combine_rows(y0, k, weights);
  auto out = at::empty_like(y0);
  with_storage(y0.scalar_type(), [&](auto stored, auto number) {
    const auto p =
        combine_params<decltype(stored), decltype(number)>(y0, rows, weights, h, ordered, out);
    C10_CUDA_CHECK(launch_stage(p, y0.numel(), current_stream()));
  });
  return out;
}

std::vector<at::Tensor> time_tensors_cuda(at::ArrayRef<double> values, at::ScalarType dtype,
                                          at::Device device) {
  const bool direct = dtype == at::kFloat || dtype == at::kDouble;
  const auto out =
      at::empty({int64_t(values.size())}, at::device(device).dtype(direct ? dtype : at::kDouble));
  const CUDAGuard guard(out.device());
  AT_DISPATCH_FLOATING_TYPES(out.scalar_type(), "time_tensors", [&] {
    C10_CUDA_CHECK(launch_store_values(values.data(), out.numel(), out.data_ptr<scalar_t>(),
                                       current_stream()));
  });
  return out.to(dtype).unbind();
}

// An op without tensors is dispatched by nothing but its arguments: here.
std::vector<at::Tensor> time_tensors(at::ArrayRef<double> values, at::ScalarType dtype,
                                     at::Device device) {
  if (device.is_cuda()) return time_tensors_cuda(values, dtype, device);
  static const auto op = find_op<decltype(time_tensors)>("pycnf::time_tensors");
  const auto key = c10::computeDispatchKey(dtype, /*layout=*/std::nullopt, device);
  return op.redispatch(c10::DispatchKeySet(key), values, dtype, device);
}

at::Tensor probe_keys_cuda(const at::Tensor& x) {
  const CUDAGuard guard(x.device());
  return make_keys(x, [](const auto& p, int64_t batch) {
    C10_CUDA_CHECK(launch_hash_keys(p, batch, current_stream()));
  });
}

at::Tensor probe_sample_cuda(const at::Tensor& keys, int64_t seed, int64_t probes, int64_t features,
                             bool gaussian, at::ScalarType dtype) {
  const CUDAGuard guard(keys.device());
  return make_probes(keys, seed, probes, features, gaussian, dtype, [](const auto& p) {
    C10_CUDA_CHECK(launch_sample_probes(p, current_stream()));
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, BackendSelect, m) { m.impl("time_tensors", time_tensors); }

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) {
  m.impl("rk_stage", rk_stage_cuda);
  m.impl("rk_finish", rk_finish_cuda);
  m.impl("attempt_stage", attempt_stage_cuda);
  m.impl("attempt_finish", attempt_finish_cuda);
  m.impl("attempt_control", attempt_control_cuda);
  m.impl("attempt_advance", attempt_advance_cuda);
  m.impl("attempt_combine", attempt_combine_cuda);
  m.impl("flow_control", flow_control_cuda);
  m.impl("flow_advance", flow_advance_cuda);
  m.impl("rk_interpolate", rk_interpolate_cuda);
  m.impl("rk_initial_norms", rk_initial_norms_cuda);
  m.impl("rk_combine", rk_combine_cuda);
  m.impl("probe_keys", probe_keys_cuda);
  m.impl("probe_sample", probe_sample_cuda);
}

}  // namespace pycnf
