// The adjoint of a solve with steps shared by the batch: z and its cotangent integrated back, the
// parameters' gradient with them.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "torch/mlp_gradient.h"
#include "torch/mlp_loop.h"

namespace pycnf {
namespace {

// Parameters are a quadrature: rates g by stage and thread, added up to Σ h b g with each accepted
// step. Where they count in the norm, `segments` says which parameters share a part of it (-1:
// none).
template <typename T>
class AdjointSolver {
 public:
  AdjointSolver(const MlpSetup<T>& setup, const at::Tensor& z, const at::Tensor& z_bar,
                const std::optional<at::Tensor>& extras_bar, const StepControl& control,
                at::IntArrayRef segments)
      : setup_(setup),
        tableau_(*setup.solve.tableau),
        control_(control),
        y0_(setup.empty_tiles(2 * features())),
        y1_(setup.empty_tiles(2 * features())),
        k_(at::empty({tableau_.stages, setup.tiles, 2 * features(), setup.samples}, setup.options)),
        norms_(setup.tiles * setup.samples),
        rates_(setup.tiles * setup.samples),
        sums_(setup, tableau_.stages),
        totals_(sums_.layout().numbers),
        pointers_(setup.chunks) {
    y0_.slice(1, 0, features()).copy_(setup.to_tiles(z.contiguous(), features()));
    y0_.slice(1, features()).copy_(setup.cotangent_tiles(z_bar.contiguous(), features()));
    extras_ = extras_bar.has_value()
                  ? setup.cotangent_tiles(extras_bar->t().contiguous(), setup.extras)
                  : at::zeros({setup.tiles, setup.extras, setup.samples}, setup.options);
    for (int64_t chunk = 0; chunk < setup.chunks; ++chunk) {
      mixed_.emplace_back(setup, tableau_.stages, false);
    }
    for (int i = 0; i < tableau_.stages; ++i) set_of_stage_[i] = i;
    if (setup.context.defined()) {
      const int64_t width = setup.solve.field.layer[0].out;
      contexts_ = at::zeros({tableau_.stages, setup.tiles, width, setup.samples}, setup.options);
      context_total_ = at::zeros({setup.tiles, width, setup.samples}, setup.options);
    }
    read_segments(segments);
  }

  // ---- what the loop asks for --------------------------------------------------------------------

  Report report;

  void first(double t, double& d0, double& d1) {
    evaluate_first(t, rates_.data());
    d0 = norm(norms_);
    d1 = std::max(norm(rates_), norm_of_rates(0, -1));
  }

  double trial(double t, double h) {
    ++report.evaluations;
    // The parameters' rates are stage 1's, and the network at stage 1 is the one at t.
    const double times[2] = {t, t};
    setup_.prepare(2, times, false, true, times_of_step_);
    run(setup_.steps.adjoint_trial, attempt_of(h, nullptr), 1, 2);
    return std::max(norm(norms_), norm_of_rates(1, 0));
  }

  double attempt(double t, double h, double t_next) {
    setup_.prepare_step(t, h, t_next, false, true, times_of_step_);
    report.evaluations += tableau_.stages - 1;
    run(setup_.steps.adjoint_attempt, attempt_of(h, nullptr), 1, tableau_.stages);
    return std::max(norm(norms_), norm_of_error(h));
  }

  void accept(double, double h, double) {
    add_rates(h, totals_.data());
    for (int i = 0; i < tableau_.stages && context_total_.defined(); ++i) {
      if (tableau_.b[i] != 0) {
        context_total_.sub_(contexts_[set_of_stage_[i]], T(h) * T(tableau_.b[i]));
      }
    }
    std::swap(y0_, y1_);
  }

  void advance(double t) {
    if (tableau_.solution_is_last_stage) {
      flip_ = !flip_;
      std::swap(set_of_stage_[0], set_of_stage_[tableau_.stages - 1]);
    } else {
      evaluate_first(t, nullptr);
    }
  }

  int64_t worst() const {
    return worst_of(norms_, setup_.batch, double(features()), double(features()));
  }

  int64_t not_finite(bool rates) const {
    return first_not_finite<T>(
        setup_.from_tiles(rates ? k_[0] : y0_, 2 * features(), 0, 2 * features()));
  }

  // ---- results -----------------------------------------------------------------------------------

  at::Tensor x_bar() const {
    return setup_.from_tiles(y0_, 2 * features(), features(), features());
  }

  at::Tensor context_bar() const {
    if (!context_total_.defined()) return at::empty({0}, setup_.options);
    const int64_t width = setup_.solve.field.layer[0].out;
    return setup_.from_tiles(context_total_, width, 0, width);
  }

  std::vector<at::Tensor> parameters_bar(const Parameters& parameters) const {
    return sums_.tensors(totals_.data(), parameters);
  }

 private:
  int64_t features() const { return setup_.solve.field.features; }

  MlpAdjointAttempt<T> attempt_of(double h, SampleNorms* rates) {
    MlpAdjointAttempt<T> adjoint = {};
    auto& attempt = adjoint.attempt;
    attempt.h = T(h);
    attempt.rtol = T(control_.rtol);
    attempt.atol = T(control_.atol);
    attempt.at = times_of_step_.at.data();
    attempt.y0 = mutable_values<T>(y0_);
    attempt.y1 = mutable_values<T>(y1_);
    attempt.k = mutable_values<T>(k_);
    attempt.tiles = setup_.tiles;
    attempt.flip = flip_;
    attempt.norms = norms_.data();
    attempt.rates = rates;
    adjoint.extras_bar = values<T>(extras_);
    return adjoint;
  }

  // Runs stages [begin, end), and has their parameters' rates in the first thread's sums.
  template <typename Function>
  void run(Function function, const MlpAdjointAttempt<T>& common, int begin, int end) {
    T* contexts[kMaxStages] = {};
    for (int i = begin; i < end && contexts_.defined(); ++i) {
      contexts_[set_of_stage_[i]].zero_();
      contexts[i] = mutable_values<T>(contexts_) + set_of_stage_[i] * contexts_.stride(0);
    }
    setup_.for_each_chunk([&](int64_t chunk) {
      MlpAdjointAttempt<T> adjoint = common;
      auto& gradients = pointers_[chunk];
      for (int i = begin; i < end; ++i) {
        sums_.clear(chunk, set_of_stage_[i]);
        gradients[i] = sums_.layers(chunk, set_of_stage_[i]);
      }
      adjoint.gradients = gradients.data();
      adjoint.mixed_bar = mixed_[chunk].pointers();
      adjoint.context_bar = contexts_.defined() ? contexts : nullptr;
      for (int64_t tile = setup_.first_tile(chunk); tile < setup_.first_tile(chunk + 1); ++tile) {
        function(setup_.solve, adjoint, tile, setup_.memory_of(chunk));
      }
      for (int i = begin; i < end; ++i) {
        mixed_[chunk].unmix(i, adjoint.attempt.at[i], gradients[i]);
      }
    });
    for (int i = begin; i < end; ++i) sums_.reduce(set_of_stage_[i]);
  }

  void evaluate_first(double t, SampleNorms* rates) {
    ++report.evaluations;
    setup_.prepare(1, &t, false, false, times_of_step_);
    run(setup_.steps.adjoint_first, attempt_of(0, rates), 0, 1);
  }

  // The larger of the RMS over z and over its cotangent, of all samples.
  double norm(const std::vector<SampleNorms>& norms) const {
    SampleNorms sum = {};
    for (int64_t b = 0; b < setup_.batch; ++b) {
      sum.first += norms[b].first;
      sum.second += norms[b].second;
    }
    const double size = double(setup_.batch * features());
    return norm_of(sum, size, size);
  }

  const T* rates_of(int stage) const { return sums_.numbers(0, set_of_stage_[stage]); }

  // Σ h w g over the stages, added to `sum` with the sign of the adjoint.
  void add_rates(double h, T* sum) const {
    for (int i = 0; i < tableau_.stages; ++i) {
      const T weight = T(h) * T(tableau_.b[i]);
      if (weight == T(0)) continue;
      const T* rate = rates_of(i);
      for (int64_t p = 0; p < int64_t(totals_.size()); ++p) sum[p] -= weight * rate[p];
    }
  }

  void read_segments(at::IntArrayRef segments) {
    if (segments.empty()) return;
    const int64_t count = setup_.solve.field.layers * kPerLayer;
    TORCH_CHECK(int64_t(segments.size()) == 2 * count, "segments must be 2 numbers for each of ",
                count, " parameters, got ", segments.size());
    for (int64_t i = 0; i < count; ++i) {
      const int64_t segment = segments[2 * i];
      if (segment < 0) continue;
      if (segment >= int64_t(sizes_.size())) sizes_.resize(segment + 1);
      sizes_[segment] += segments[2 * i + 1];
      const auto [begin, end] = sums_.layout().range(i / kPerLayer, i % kPerLayer);
      ranges_.push_back({segment, begin, end});
    }
  }

  // The largest RMS over a segment of value(p) by parameter.
  template <typename Value>
  double norm_of_parameters(const Value& value) const {
    std::vector<double> squares(sizes_.size());
    for (const auto& range : ranges_) {
      for (int64_t p = range.begin; p < range.end; ++p) {
        const double scaled = double(value(p));
        squares[range.segment] += scaled * scaled;
      }
    }
    double largest = 0;
    for (size_t i = 0; i < sizes_.size(); ++i) {
      const double norm = std::sqrt(squares[i] / double(sizes_[i]));
      largest = std::isnan(norm) ? INFINITY : std::max(largest, norm);
    }
    return largest;
  }

  // Of one stage's rates at the start, less another's.
  double norm_of_rates(int stage, int less) const {
    const T atol = T(control_.atol);
    const T* rate = rates_of(stage);
    const T* other = less < 0 ? nullptr : rates_of(less);
    return norm_of_parameters(
        [&](int64_t p) { return (rate[p] - (other != nullptr ? other[p] : T(0))) / atol; });
  }

  double norm_of_error(double h) const {
    if (ranges_.empty()) return 0;
    std::vector<T> end = totals_;
    add_rates(h, end.data());
    const T rtol = T(control_.rtol), atol = T(control_.atol);
    return norm_of_parameters([&](int64_t p) {
      T error = T(0);
      for (int i = 0; i < tableau_.stages; ++i) {
        if (tableau_.e[i] != 0) error += T(h) * T(tableau_.e[i]) * rates_of(i)[p];
      }
      return error / (atol + rtol * std::max(std::abs(totals_[p]), std::abs(end[p])));
    });
  }

  const MlpSetup<T>& setup_;
  const Tableau& tableau_;
  const StepControl& control_;
  at::Tensor y0_, y1_, k_, extras_, contexts_, context_total_;
  std::vector<SampleNorms> norms_, rates_;
  MlpTimes<T> times_of_step_;
  bool flip_ = false;
  GradientSums<T> sums_;  // by thread and stage
  std::vector<T> totals_;
  std::vector<MixedBars<T>> mixed_;
  std::vector<std::array<const LayerGradient<T>*, kMaxStages>> pointers_;
  int set_of_stage_[kMaxStages] = {};
  struct Range {
    int64_t segment, begin, end;
  };
  std::vector<Range> ranges_;
  std::vector<int64_t> sizes_;
};

using AdjointGradient = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor>;

AdjointGradient mlp_adjoint_cpu(
    const at::Tensor& z, const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& keys,
    at::IntArrayRef noise, const std::optional<at::Tensor>& context, const Parameters& parameters,
    std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights, double start,
    double end, at::ArrayRef<double> control, at::ArrayRef<double> grid, at::IntArrayRef segments) {
  AdjointGradient result;
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_adjoint", [&] {
    MlpSetup<scalar_t> setup(z, {probe, keys, noise, context, parameters, method, kind, weights},
                             false);
    setup.every_stage_mixed = true;
    setup.turn_weights();
    const bool adaptive = setup.solve.tableau->adaptive;
    StepControl steps = {.atol = 1};
    if (adaptive) steps = read_control(control);
    AdjointSolver<scalar_t> solver(setup, z, z_bar, extras_bar, steps, segments);
    if (adaptive) {
      solve_adaptive(solver, *setup.solve.tableau, steps, start, end);
    } else {
      solve_fixed(solver, grid);
    }
    result = {solver.x_bar(), solver.context_bar(), solver.parameters_bar(parameters),
              solver.report.tensor()};
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) { m.impl("mlp_adjoint", mlp_adjoint_cpu); }

}  // namespace pycnf
