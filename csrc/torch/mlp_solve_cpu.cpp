// The fused engine's solve and its gradient: the loop over steps, and the split over threads.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "core/control.h"
#include "torch/interrupt.h"
#include "torch/mlp_solve.h"
#include "torch/recycled.h"

namespace pycnf {

void (*check_interrupt)() = [] {};

namespace {

enum class Status : int { kDone, kTooManySteps, kUnderflow, kStateNotFinite, kFieldNotFinite };

// Read by pycnf/flows/fused.py.
struct Report {
  int64_t accepted = 0;
  int64_t rejected = 0;
  int64_t evaluations = 0;
  double step_size = 0;  // what the controller would try next
  Status status = Status::kDone;
  double time = 0;  // where it failed
  double size = 0;
  bool finite = true;
  int64_t worst = 0;  // sample

  at::Tensor tensor() const {
    return at::tensor({double(accepted), double(rejected), double(evaluations), step_size,
                       double(int(status)), time, size, double(finite), double(worst)},
                      at::kDouble);
  }
};

StepControl read_control(at::ArrayRef<double> values) {
  TORCH_CHECK(values.size() == 8, "control must be 8 numbers, got ", values.size());
  return {values[0], values[1], values[2], values[3],
          values[4], values[5], values[6], int64_t(values[7])};
}

template <typename T>
class Solver {
 public:
  Solver(MlpSetup<T>& setup, const at::Tensor& x, int64_t keep_bytes)
      : setup_(setup),
        tableau_(*setup.solve.tableau),
        y0_(setup.to_tiles(x, setup.rows)),
        y1_(setup.empty_state()),
        k_(at::empty({tableau_.stages, setup.tiles, setup.rows, setup.samples}, setup.options)),
        norms_(setup.tiles),
        taping_(keep_bytes >= 0),
        budget_(keep_bytes) {
    const bool reused = tableau_.solution_is_last_stage;
    slots_ = tableau_.stages - (reused ? 1 : 0);
    stage_bytes_ = setup.tiles * setup.kept_numbers * int64_t(sizeof(T));
    keeping_ = budget_ >= stage_bytes_ * (1 + slots_);
    if (!taping_) return;
    kept_.push_back(keep(1));
    kept_pointers_[0] = pointer(kept_[0], 0);
  }

  Report adaptive(double start, double end, const StepControl& control);
  Report fixed(at::ArrayRef<double> grid);

  at::Tensor z() const {
    return setup_.from_tiles(y0_, setup_.rows, 0, setup_.solve.field.features);
  }

  at::Tensor logdet() const {
    if (setup_.solve.tangents == 0) return at::zeros({setup_.solve.batch}, setup_.options);
    return setup_.from_tiles(y0_, setup_.rows, setup_.solve.field.features, 1).flatten();
  }

  at::Tensor times() const {
    return at::tensor(times_, at::kDouble).view({int64_t(times_.size()) / 3, 3});
  }

  const std::vector<at::Tensor>& states() const { return states_; }
  const std::vector<at::Tensor>& kept() const { return kept_; }

 private:
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

  MlpAttempt<T> attempt(double h, const StepControl* control) {
    MlpAttempt<T> attempt = {};
    attempt.h = T(h);
    attempt.rtol = control != nullptr ? T(control->rtol) : T(0);
    attempt.atol = control != nullptr ? T(control->atol) : T(1);
    attempt.timed = times_of_step_.timed.data();
    attempt.y0 = mutable_values<T>(y0_);
    attempt.y1 = mutable_values<T>(y1_);
    attempt.k = mutable_values<T>(k_);
    attempt.flip = flip_;
    attempt.kept = kept_pointers_;
    return attempt;
  }

  template <typename Function>
  MlpNorms run(Function function, const MlpAttempt<T>& attempt) {
    setup_.for_each_tile([&](int64_t tile, T* memory) {
      norms_[tile] = function(setup_.solve, attempt, tile, memory);
    });
    MlpNorms sum = {};
    for (const auto& norms : norms_) {
      for (int which = 0; which < 2; ++which) {
        sum.z[which] += norms.z[which];
        sum.logdet[which] += norms.logdet[which];
      }
      sum.nonfinite += norms.nonfinite;
    }
    return sum;
  }

  // The larger of the RMS over z and over ℓ.
  double norm(const MlpNorms& norms, int which) const {
    const auto& solve = setup_.solve;
    const double z = std::sqrt(norms.z[which] / double(solve.batch * solve.field.features));
    const double logdet = std::sqrt(norms.logdet[which] / double(solve.batch));
    return logdet > z ? logdet : z;
  }

  // The first stage at y0, kept where the newest step's first stage belongs.
  MlpNorms evaluate_first(double t, const StepControl* control) {
    ++report_.evaluations;
    setup_.prepare(t, 0, t, times_of_step_);
    return run(setup_.table.first_stage, attempt(0, control));
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

  // Puts an accepted step on the tape and moves to its end.
  void accept(double t, double h, double t_next) {
    ++report_.accepted;
    if (taping_) {
      times_.insert(times_.end(), {t, h, t_next});
      states_.push_back(y0_);
      y0_ = y1_;
      y1_ = setup_.empty_state();
      // The last slot: of the last stage, or of the next step's own first.
      kept_pointers_[0] = pointer(kept_.back(), slots_ - 1);
    } else {
      std::swap(y0_, y1_);
    }
  }

  Report fail(Status status, double t, double size, bool finite, MlpAttempt<T> attempt) {
    report_.status = status;
    report_.time = t;
    report_.size = size;
    report_.finite = finite;
    std::vector<double> errors(setup_.solve.batch);
    attempt.errors = errors.data();
    run(setup_.table.attempt, attempt);
    double worst = -1;
    for (int64_t b = 0; b < setup_.solve.batch; ++b) {
      const double error = std::isfinite(errors[b]) ? errors[b] : INFINITY;
      if (error > worst) {
        worst = error;
        report_.worst = b;
      }
    }
    return report_;
  }

  Report fail_at_start(const at::Tensor& tiles, Status status, double t) {
    report_.status = status;
    report_.time = t;
    const auto rows = setup_.from_tiles(tiles, setup_.rows, 0, setup_.rows);
    const T* value = values<T>(rows);
    int64_t i = 0;
    while (i + 1 < rows.numel() && std::isfinite(value[i])) ++i;
    report_.worst = i / setup_.rows;
    return report_;
  }

  MlpSetup<T>& setup_;
  const Tableau& tableau_;
  at::Tensor y0_, y1_, k_;
  std::vector<MlpNorms> norms_;
  typename MlpSetup<T>::StepTimes times_of_step_;
  bool flip_ = false;
  Report report_;

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

template <typename T>
Report Solver<T>::adaptive(double start, double end, const StepControl& control) {
  const double length = std::abs(end - start), direction = end > start ? 1 : -1;
  const int order = tableau_.order;
  const auto first = evaluate_first(start, &control);
  if (first.nonfinite > 0) {
    if (!at::isfinite(y0_).all().item<bool>()) {
      return fail_at_start(y0_, Status::kStateNotFinite, start);
    }
    return fail_at_start(k_[0], Status::kFieldNotFinite, start);
  }
  double size = control.first_step;
  if (size == 0) {
    const double d0 = norm(first, 0), d1 = norm(first, 1);
    const double h0 = trial_step(d0, d1, length);
    setup_.prepare(start + direction * h0, 0, start + direction * h0, times_of_step_);
    ++report_.evaluations;
    const double d2 = norm(run(setup_.table.trial, attempt(direction * h0, &control)), 0) / h0;
    size = std::isfinite(d2) ? initial_step(h0, d1, d2, order, length) : h0 * control.dfactor;
  }
  double t = start;
  while (true) {
    check_interrupt();
    const double left = std::abs(end - t);
    size = std::min(size, control.max_step);
    const bool last = size >= left * (1 - kClose);
    const double taken = last ? left : size;
    const double t_next = last ? end : t + direction * taken;
    const bool exhausted = report_.accepted + report_.rejected + 1 >= control.max_num_steps;
    begin_step();
    setup_.prepare(t, direction * taken, t_next, times_of_step_);
    report_.evaluations += tableau_.stages - 1;
    const auto tried = attempt(direction * taken, &control);
    const auto norms = run(setup_.table.attempt, tried);
    double error = norm(norms, 0);
    if (norms.nonfinite > 0 || !std::isfinite(error)) error = INFINITY;
    const double grown = taken * step_factor(control, error, order);
    if (error <= 1 && last) {
      accept(t, direction * taken, t_next);
      report_.step_size = std::max(size, grown);
      return report_;
    }
    if (error > 1) ++report_.rejected;
    if (exhausted || grown < kTiny * length) {
      if (error <= 1) ++report_.accepted;
      return fail(exhausted ? Status::kTooManySteps : Status::kUnderflow,
                  exhausted && error <= 1 ? t_next : t, grown, std::isfinite(error), tried);
    }
    if (error <= 1) {
      accept(t, direction * taken, t_next);
      t = t_next;
      if (tableau_.solution_is_last_stage) {
        flip_ = !flip_;
      } else {
        evaluate_first(t, &control);
      }
    }
    size = grown;
  }
}

template <typename T>
Report Solver<T>::fixed(at::ArrayRef<double> grid) {
  TORCH_CHECK(grid.size() >= 2, "grid must have at least two times, got ", grid.size());
  for (size_t i = 0; i + 1 < grid.size(); ++i) {
    check_interrupt();
    const double t = grid[i], h = grid[i + 1] - grid[i];
    const auto first = evaluate_first(t, nullptr);
    if (i == 0 && first.nonfinite > 0) {
      if (!at::isfinite(y0_).all().item<bool>()) {
        return fail_at_start(y0_, Status::kStateNotFinite, t);
      }
      return fail_at_start(k_[0], Status::kFieldNotFinite, t);
    }
    begin_step();
    setup_.prepare(t, h, grid[i + 1], times_of_step_);
    report_.evaluations += tableau_.stages - 1;
    const auto tried = attempt(h, nullptr);
    const auto norms = run(setup_.table.attempt, tried);
    if (norms.nonfinite > 0) return fail(Status::kUnderflow, t, h, false, tried);
    accept(t, h, grid[i + 1]);
  }
  report_.step_size = std::abs(grid[grid.size() - 1] - grid[grid.size() - 2]);
  return report_;
}

using Solution = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>,
                            std::vector<at::Tensor>>;

Solution mlp_solve_cpu(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                       const std::optional<at::Tensor>& context, const Parameters& parameters,
                       int64_t activation, int64_t fourier, std::string_view method,
                       bool unit_probes, double sign, double start, double end,
                       at::ArrayRef<double> control, at::ArrayRef<double> grid,
                       int64_t keep_bytes) {
  TORCH_CHECK(x.dim() == 2, "x must be [B, D], got ", x.sizes());
  Solution solution;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_solve", [&] {
    MlpSetup<scalar_t> setup(x.size(0), x.size(1), x.options().requires_grad(std::nullopt), probe,
                             context, parameters, activation, fourier, method, unit_probes, sign);
    Solver<scalar_t> solver(setup, x.contiguous(), keep_bytes);
    const auto report = setup.solve.tableau->adaptive
                            ? solver.adaptive(start, end, read_control(control))
                            : solver.fixed(grid);
    solution = {solver.z(),     solver.logdet(), report.tensor(),
                solver.times(), solver.states(), solver.kept()};
  });
  return solution;
}

// ---- gradient -----------------------------------------------------------------------------------

// Where the gradients of all parameters are in the memory of a thread.
template <typename T>
struct GradientLayout {
  int64_t numbers = 0;
  struct Layer {
    int64_t weight, stride, bias, gate_weight, gate_bias, shift_weight;
    bool swapped;
  } layer[kMaxLayers];

  explicit GradientLayout(const MlpSetup<T>& setup) {
    const auto& field = setup.solve.field;
    const auto take = [&](int64_t count) {
      const int64_t at = numbers;
      numbers += count;
      return at;
    };
    for (int l = 0; l < field.layers; ++l) {
      const auto& of = field.layer[l];
      const int64_t width = setup.padded(of.out);
      auto& at = layer[l];
      // Rows of whole vectors: along the inputs, unless that would leave most lanes empty.
      at.swapped = of.in < setup.table.lanes && of.out > of.in;
      at.stride = setup.padded(at.swapped ? of.out : of.in);
      at.weight = take((at.swapped ? of.in : of.out) * at.stride);
      at.bias = take(width);
      at.gate_weight = take(field.time_features * width);
      at.gate_bias = take(width);
      at.shift_weight = take(field.time_features * width);
    }
  }

  void pointers(T* memory, LayerGradient<T>* gradients, int layers) const {
    for (int l = 0; l < layers; ++l) {
      const auto& at = layer[l];
      gradients[l] = {memory + at.weight,
                      at.stride,
                      at.swapped,
                      memory + at.bias,
                      memory + at.gate_weight,
                      memory + at.gate_bias,
                      memory + at.shift_weight};
    }
  }
};

// The gradients as tensors like the parameters, from the sums of all threads.
template <typename T>
std::vector<at::Tensor> collect(const MlpSetup<T>& setup, const GradientLayout<T>& layout,
                                const Parameters& parameters, const T* memory, int64_t chunks) {
  const auto& field = setup.solve.field;
  std::vector<at::Tensor> result;
  const auto sum = [&](int64_t at) {
    T total = memory[at];
    for (int64_t chunk = 1; chunk < chunks; ++chunk) total += memory[chunk * layout.numbers + at];
    return total;
  };
  for (int l = 0; l < field.layers; ++l) {
    const auto& of = field.layer[l];
    const auto& at = layout.layer[l];
    const int64_t width = setup.padded(of.out);
    // value(i) of parameter `which`, in the order of its own numbers.
    const auto add = [&](int which, const auto& value) {
      const std::optional<at::Tensor> parameter = parameters.get(l * kPerLayer + which);
      auto gradient =
          at::empty(parameter.has_value() ? parameter->sizes() : at::IntArrayRef{0}, setup.options);
      T* out = mutable_values<T>(gradient);
      for (int64_t i = 0; i < gradient.numel(); ++i) out[i] = value(i);
      result.push_back(gradient);
    };
    const auto of_time = [&](int64_t first) {
      return [&, first](int64_t i) {
        return sum(first + i % field.time_features * width + i / field.time_features);
      };
    };
    add(0, [&](int64_t i) {
      const int64_t o = i / of.in, in = i % of.in;
      return sum(at.weight + (at.swapped ? in * at.stride + o : o * at.stride + in));
    });
    add(1, [&](int64_t i) { return sum(at.bias + i); });
    add(2, of_time(at.gate_weight));
    add(3, [&](int64_t i) { return sum(at.gate_bias + i); });
    add(4, of_time(at.shift_weight));
  }
  return result;
}

template <typename T>
std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> solve_backward(
    MlpSetup<T>& setup, const at::Tensor& z_bar, const std::optional<at::Tensor>& logdet_bar,
    bool has_context, const Parameters& parameters, const at::Tensor& times, at::TensorList states,
    at::TensorList kept) {
  const auto& solve = setup.solve;
  const Tableau& tableau = *solve.tableau;
  const int64_t features = solve.field.features, width = solve.field.layer[0].out;
  const int64_t steps = times.size(0);
  TORCH_CHECK(int64_t(states.size()) == steps && int64_t(kept.size()) == steps + 1,
              "states and kept must belong to the ", steps, " steps of times");
  auto z_tiles = setup.to_tiles(z_bar.contiguous(), features);
  auto logdet_tiles = at::zeros({setup.tiles, 1, setup.samples}, setup.options);
  if (logdet_bar.has_value()) {
    logdet_tiles = setup.to_tiles(logdet_bar->reshape({solve.batch, 1}).contiguous(), 1);
  }
  // The copies that fill up the last tile have no part in the gradient.
  const int64_t live = solve.batch - (setup.tiles - 1) * setup.samples;
  z_tiles[setup.tiles - 1].slice(1, live).zero_();
  logdet_tiles[setup.tiles - 1].slice(1, live).zero_();
  at::Tensor context_tiles;
  if (has_context) {
    context_tiles = at::zeros({setup.tiles, width, setup.samples}, setup.options);
  }

  const GradientLayout<T> layout(setup);
  const auto sums = at::zeros({setup.chunks * layout.numbers + setup.kAlign}, setup.options);
  T* const memory = setup.aligned(mutable_values<T>(sums));
  const int64_t slots = tableau.stages - (tableau.solution_is_last_stage ? 1 : 0);
  const int64_t block = setup.tiles * setup.kept_numbers;
  const double* time = times.const_data_ptr<double>();

  at::parallel_for(0, setup.chunks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      LayerGradient<T> gradients[kMaxLayers];
      layout.pointers(memory + chunk * layout.numbers, gradients, solve.field.layers);
      typename MlpSetup<T>::StepTimes step_times;
      T* pointers[kMaxStages];
      MlpReverseStep<T> step = {};
      step.kept = pointers;
      step.logdet_bar = values<T>(logdet_tiles);
      step.z_bar = mutable_values<T>(z_tiles);
      step.context_bar = has_context ? mutable_values<T>(context_tiles) : nullptr;
      step.gradients = gradients;
      for (int64_t n = steps - 1; n >= 0; --n) {
        setup.prepare(time[3 * n], time[3 * n + 1], time[3 * n + 2], step_times);
        step.h = T(time[3 * n + 1]);
        step.timed = step_times.timed.data();
        step.tau = step_times.tau.data();
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
          setup.table.reverse(solve, step, tile, setup.memory_of(chunk));
        }
      }
    }
  });

  auto context_bar = has_context ? setup.from_tiles(context_tiles, width, 0, width)
                                 : at::empty({0}, setup.options);
  return {setup.from_tiles(z_tiles, features, 0, features), context_bar,
          collect(setup, layout, parameters, memory, setup.chunks)};
}

std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> mlp_solve_backward_cpu(
    const at::Tensor& z_bar, const std::optional<at::Tensor>& logdet_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& context,
    const Parameters& parameters, int64_t activation, int64_t fourier, std::string_view method,
    bool unit_probes, double sign, const at::Tensor& times, at::TensorList states,
    at::TensorList kept) {
  std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>> result;
  AT_DISPATCH_FLOATING_TYPES(z_bar.scalar_type(), "mlp_solve_backward", [&] {
    MlpSetup<scalar_t> setup(z_bar.size(0), z_bar.size(1), z_bar.options(), probe, context,
                             parameters, activation, fourier, method, unit_probes, sign);
    result = solve_backward(setup, z_bar, logdet_bar, context.has_value(), parameters, times,
                            states, kept);
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("mlp_solve", mlp_solve_cpu);
  m.impl("mlp_solve_backward", mlp_solve_backward_cpu);
}

}  // namespace pycnf
