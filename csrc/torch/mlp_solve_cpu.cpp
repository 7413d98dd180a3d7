// The fused engine's solve with steps shared by the batch, and its discrete gradient.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "torch/mlp_gradient.h"
#include "torch/mlp_loop.h"
#include "torch/recycled.h"

namespace pycnf {

namespace {

template <typename T>
class Solver {
 public:
  Solver(const MlpSetup<T>& setup, const at::Tensor& x, const StepControl& control,
         int64_t keep_bytes)
      : setup_(setup),
        tableau_(*setup.solve.tableau),
        control_(control),
        y0_(setup.to_tiles(x, setup.rows)),
        y1_(setup.empty_tiles(setup.rows)),
        k_(at::empty({tableau_.stages, setup.tiles, setup.rows, setup.samples}, setup.options)),
        norms_(setup.tiles * setup.samples),
        rates_(setup.tiles * setup.samples),
        taping_(keep_bytes >= 0),
        budget_(keep_bytes) {
    slots_ = tableau_.stages - (tableau_.solution_is_last_stage ? 1 : 0);
    stage_bytes_ = setup.tiles * setup.kept_numbers * int64_t(sizeof(T));
    keeping_ = budget_ >= stage_bytes_ * (1 + slots_);
    if (!taping_) return;
    kept_.push_back(keep(1));
    kept_pointers_[0] = pointer(kept_[0], 0);
  }

  // ---- what the loop asks for --------------------------------------------------------------------

  Report report;

  void first(double t, double& d0, double& d1) {
    evaluate_first(t, rates_.data());
    d0 = norm(norms_);
    d1 = norm(rates_);
  }

  double trial(double t, double h) {
    ++report.evaluations;
    setup_.prepare(1, &t, false, false, times_of_step_);
    run(setup_.steps.trial, attempt_of(h));
    return norm(norms_);
  }

  double attempt(double t, double h, double t_next) {
    begin_step();
    setup_.prepare_step(t, h, t_next, false, true, times_of_step_);
    report.evaluations += tableau_.stages - 1;
    run(setup_.steps.attempt, attempt_of(h));
    return norm(norms_);
  }

  void accept(double t, double h, double t_next) {
    if (taping_) {
      times_.insert(times_.end(), {t, h, t_next});
      states_.push_back(state_of_step());
      // The last slot: of the last stage, or of the next step's own first.
      kept_pointers_[0] = pointer(kept_.back(), slots_ - 1);
    }
    std::swap(y0_, y1_);
  }

  void advance(double t) {
    if (tableau_.solution_is_last_stage) {
      flip_ = !flip_;
    } else {
      evaluate_first(t, nullptr);
    }
  }

  int64_t worst() const { return worst_of(norms_, setup_.batch, double(features()), 1); }

  int64_t not_finite(bool rates) const {
    return first_not_finite<T>(setup_.from_tiles(rates ? k_[0] : y0_, setup_.rows, 0, setup_.rows));
  }

  // ---- results -----------------------------------------------------------------------------------

  at::Tensor z() const { return setup_.from_tiles(y0_, setup_.rows, 0, features()); }

  at::Tensor extras() const {
    return setup_.from_tiles(y0_, setup_.rows, features(), setup_.extras).t().contiguous();
  }

  at::Tensor times() const {
    return at::tensor(times_, at::kDouble).view({int64_t(times_.size()) / 3, 3});
  }

  const std::vector<at::Tensor>& states() const { return states_; }
  const std::vector<at::Tensor>& kept() const { return kept_; }

 private:
  int64_t features() const { return setup_.solve.field.features; }

  // Memory for the stages of a step, or nothing once the budget is spent.
  at::Tensor keep(int64_t slots) {
    const int64_t numbers = keeping_ ? slots * setup_.tiles * setup_.kept_numbers : 0;
    budget_ -= numbers * int64_t(sizeof(T));
    return recycled(numbers, setup_.options);
  }

  T* pointer(const at::Tensor& kept, int64_t slot) const {
    if (kept.numel() == 0) return nullptr;
    return mutable_values<T>(kept) + slot * setup_.tiles * setup_.kept_numbers;
  }

  MlpAttempt<T> attempt_of(double h) {
    MlpAttempt<T> attempt = {};
    attempt.h = T(h);
    attempt.rtol = T(control_.rtol);
    attempt.atol = T(control_.atol);
    attempt.at = times_of_step_.at.data();
    attempt.y0 = mutable_values<T>(y0_);
    attempt.y1 = mutable_values<T>(y1_);
    attempt.k = mutable_values<T>(k_);
    attempt.tiles = setup_.tiles;
    attempt.flip = flip_;
    attempt.kept = kept_pointers_;
    attempt.norms = norms_.data();
    return attempt;
  }

  template <typename Function>
  void run(Function function, const MlpAttempt<T>& attempt) {
    setup_.for_each_tile(
        [&](int64_t, int64_t tile, T* memory) { function(setup_.solve, attempt, tile, memory); });
  }

  // The first stage at y0, kept where the newest step's first stage belongs.
  void evaluate_first(double t, SampleNorms* rates) {
    ++report.evaluations;
    setup_.prepare(1, &t, false, false, times_of_step_);
    auto attempt = attempt_of(0);
    attempt.rates = rates;
    run(setup_.steps.first_stage, attempt);
  }

  // The larger of the RMS over z and over ℓ, of all samples.
  double norm(const std::vector<SampleNorms>& norms) const {
    SampleNorms sum = {};
    for (int64_t b = 0; b < setup_.batch; ++b) {
      sum.first += norms[b].first;
      sum.second += norms[b].second;
    }
    return norm_of(sum, double(setup_.batch * features()), double(setup_.batch));
  }

  void begin_step() {
    if (!taping_) return;
    if (kept_.size() < states_.size() + 2) {
      keeping_ = keeping_ && budget_ >= stage_bytes_ * slots_;
      kept_.push_back(keep(slots_));
    }
    const auto& block = kept_.back();
    for (int i = 1; i < tableau_.stages; ++i) kept_pointers_[i] = pointer(block, i - 1);
  }

  // z at the start of the step, [tiles, D, samples]: all that its gradient needs.
  at::Tensor state_of_step() const {
    return y0_.slice(1, 0, features()).clone(at::MemoryFormat::Contiguous);
  }

  const MlpSetup<T>& setup_;
  const Tableau& tableau_;
  const StepControl& control_;
  at::Tensor y0_, y1_, k_;
  std::vector<SampleNorms> norms_, rates_;
  MlpTimes<T> times_of_step_;
  bool flip_ = false;

  // The tape.
  bool taping_;
  bool keeping_ = false;
  int64_t budget_;
  int64_t slots_ = 0;  // evaluations of a step
  int64_t stage_bytes_ = 0;
  std::vector<double> times_;
  std::vector<at::Tensor> states_;
  std::vector<at::Tensor> kept_;
  T* kept_pointers_[kMaxStages] = {};
};

using Solution = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                            std::vector<at::Tensor>>;

Solution mlp_solve_cpu(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                       const std::optional<at::Tensor>& keys, at::IntArrayRef noise,
                       const std::optional<at::Tensor>& context, const Parameters& parameters,
                       std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
                       double start, double end, at::ArrayRef<double> control,
                       at::ArrayRef<double> grid, int64_t keep_bytes) {
  Solution solution;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve", [&] {
    const MlpSetup<scalar_t> setup(
        x, {probe, keys, noise, context, parameters, method, kind, weights}, false);
    const bool adaptive = setup.solve.tableau->adaptive;
    // Without tolerances norms are of the plain numbers: finite or not.
    StepControl steps = {.atol = 1};
    if (adaptive) steps = read_control(control);
    Solver<scalar_t> solver(setup, x.contiguous(), steps, keep_bytes);
    if (adaptive) {
      solve_adaptive(solver, *setup.solve.tableau, steps, start, end);
    } else {
      solve_fixed(solver, grid);
    }
    solution = {solver.z(),     solver.extras(), solver.report.tensor(),
                solver.times(), solver.states(), solver.kept()};
  });
  return solution;
}

// ---- gradient -----------------------------------------------------------------------------------

using Gradient = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor>;

template <typename T>
Gradient solve_backward(const MlpSetup<T>& setup, const at::Tensor& z_bar,
                        const std::optional<at::Tensor>& extras_bar, const Parameters& parameters,
                        const at::Tensor& times, at::TensorList states, at::TensorList kept,
                        bool need_times) {
  const auto& solve = setup.solve;
  const Tableau& tableau = *solve.tableau;
  const int64_t features = solve.field.features, width = solve.field.layer[0].out;
  const int64_t steps = times.size(0);
  TORCH_CHECK(int64_t(states.size()) == steps && int64_t(kept.size()) == steps + 1,
              "states and kept must belong to the ", steps, " steps of times");
  const auto z_tiles = setup.cotangent_tiles(z_bar.contiguous(), features);
  const auto extras_tiles =
      extras_bar.has_value() ? setup.cotangent_tiles(extras_bar->t().contiguous(), setup.extras)
                             : at::zeros({setup.tiles, setup.extras, setup.samples}, setup.options);
  at::Tensor context_tiles;
  if (setup.context.defined()) {
    context_tiles = at::zeros({setup.tiles, width, setup.samples}, setup.options);
  }
  const auto times_bar = at::zeros({need_times ? steps : 0, 2}, at::kDouble);
  std::vector<double> of_samples(need_times ? setup.tiles * 2 * setup.samples : 0);
  // By step and thread, of t and of h; added up in order at the end.
  std::vector<double> of_threads(need_times ? steps * setup.chunks * 2 : 0);

  GradientSums<T> sums(setup, 1);
  const int used = stages_in_use(tableau);
  const int64_t slots = tableau.stages - (tableau.solution_is_last_stage ? 1 : 0);
  const int64_t block = setup.tiles * setup.kept_numbers;
  const double* time = times.const_data_ptr<double>();

  Interruption interruption;
  setup.for_each_chunk([&](int64_t chunk) {
    MlpTimes<T> step_times;
    MixedBars<T> mixed(setup, used, setup.mix_is_constant);
    T* pointers[kMaxStages];
    MlpReverseStep<T> step = {};
    step.rows = features;
    step.kept = pointers;
    step.extras_bar = values<T>(extras_tiles);
    step.z_bar = mutable_values<T>(z_tiles);
    step.context_bar = context_tiles.defined() ? mutable_values<T>(context_tiles) : nullptr;
    step.times_bar = need_times ? of_samples.data() : nullptr;
    step.gradients = sums.layers(chunk, 0);
    step.mixed_bar = mixed.pointers();
    for (int64_t n = steps - 1; n >= 0 && interruption.go_on(chunk); --n) {
      setup.prepare_step(time[3 * n], time[3 * n + 1], time[3 * n + 2], need_times, false,
                         step_times);
      step.h = T(time[3 * n + 1]);
      step.at = step_times.at.data();
      step.y0 = values<T>(states[n]);
      const bool has = kept[n + 1].numel() > 0;
      for (int i = 0; i < tableau.stages; ++i) {
        if (!has) {
          pointers[i] = nullptr;
        } else if (i == 0) {
          pointers[i] = mutable_values<T>(kept[n]) + (n == 0 ? 0 : slots - 1) * block;
        } else {
          pointers[i] = mutable_values<T>(kept[n + 1]) + (i - 1) * block;
        }
      }
      for (int64_t tile = setup.first_tile(chunk); tile < setup.first_tile(chunk + 1); ++tile) {
        setup.steps.reverse(solve, step, tile, setup.memory_of(chunk));
      }
      double* of_thread = need_times ? &of_threads[(n * setup.chunks + chunk) * 2] : nullptr;
      for (int64_t tile = setup.first_tile(chunk); need_times && tile < setup.first_tile(chunk + 1);
           ++tile) {
        const double* of = &of_samples[tile * 2 * setup.samples];
        for (int64_t i = 0; i < 2 * setup.samples; ++i) of_thread[i / setup.samples] += of[i];
      }
      for (int i = 0; i < used; ++i) {
        // What is the same for all stages of all steps is moved once, at the end.
        if (setup.mix_is_constant ? n > 0 || i > 0 : tableau.b[i] == 0) continue;
        const double time_bar = double(mixed.unmix(i, step.at[i], step.gradients));
        if (!need_times) continue;
        of_thread[0] += time_bar;
        of_thread[1] += time_bar * tableau.c[i];
      }
    }
  });

  for (int64_t i = 0; i < int64_t(of_threads.size()); ++i) {
    const int64_t n = i / (2 * setup.chunks);
    times_bar.mutable_data_ptr<double>()[n * 2 + i % 2] += of_threads[i];
  }
  sums.reduce(0);
  auto context_bar = context_tiles.defined() ? setup.from_tiles(context_tiles, width, 0, width)
                                             : at::empty({0}, setup.options);
  return {setup.from_tiles(z_tiles, features, 0, features), context_bar,
          sums.tensors(sums.numbers(0, 0), parameters), times_bar};
}

Gradient mlp_solve_backward_cpu(
    const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& keys,
    at::IntArrayRef noise, const std::optional<at::Tensor>& context, const Parameters& parameters,
    std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
    const at::Tensor& times, at::TensorList states, at::TensorList kept, bool need_times) {
  Gradient result;
  AT_DISPATCH_FLOATING_TYPES(z_bar.scalar_type(), "mlp_solve_backward", [&] {
    TORCH_CHECK(states.size() > 0, "states must have at least one step's");
    MlpSetup<scalar_t> setup(z_bar,
                             {probe, keys, noise, context, parameters, method, kind, weights},
                             false, true, states[0].size(2));
    setup.turn_weights();
    result = solve_backward(setup, z_bar, extras_bar, parameters, times, states, kept, need_times);
  });
  return result;
}

bool mlp_solve_fits_cpu(const at::Tensor&, at::IntArrayRef, const Parameters&, at::IntArrayRef,
                        bool) {
  return true;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("mlp_solve", mlp_solve_cpu);
  m.impl("mlp_solve_fits", mlp_solve_fits_cpu);
  m.impl("mlp_solve_backward", mlp_solve_backward_cpu);
}

}  // namespace pycnf
