// The fused engine with steps per sample. The lanes of a tile hold samples with a time and a step of
// their own; a sample that is done leaves its lane to the next. Lanes never meet, so a sample's
// result has the same bits in any batch.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include <array>

#include "torch/mlp_gradient.h"
#include "torch/mlp_loop.h"

namespace pycnf {
namespace {

// The samples of one thread.
struct Share {
  int64_t begin, end;
};

template <typename T>
Share share_of(const MlpSetup<T>& setup, int64_t chunk) {
  const auto sample = [&](int64_t c) {
    return std::min(setup.first_tile(c) * setup.samples, setup.batch);
  };
  return {sample(chunk), sample(chunk + 1)};
}

// One tile whose lanes are loaded sample by sample; the kernels see it as tile 0.
template <typename T>
class Lanes {
 public:
  explicit Lanes(const MlpSetup<T>& setup)
      : solve(setup.solve),
        setup_(setup),
        probe_(std::max<int64_t>(1, solve.tangents) * solve.field.features * setup.samples +
               kAlign<T>),
        context_(setup.context.defined() ? solve.field.layer[0].out * setup.samples + kAlign<T>
                                         : 0) {
    if (setup.context.defined()) solve.context = aligned(context_.data());
    if (setup.probe.defined()) {
      solve.probe = aligned(probe_.data());
      solve.probe_stride = 0;
    } else if (solve.tangents > 0 && !solve.closed_form) {
      T* unit = aligned(probe_.data());
      for (int64_t d = 0; d < solve.field.features; ++d) {
        T* row = unit + d * solve.tangents * setup.samples;
        std::fill_n(row + d * setup.samples, setup.samples, T(1));
      }
      solve.probe = unit;
    }
  }

  void load(int64_t lane, int64_t sample) {
    const int64_t features = solve.field.features, samples = setup_.samples;
    if (setup_.probe.defined()) {
      const T* from = values<T>(setup_.probe);
      T* to = aligned(probe_.data());
      for (int64_t d = 0; d < features; ++d) {
        for (int64_t k = 0; k < solve.tangents; ++k) {
          to[(d * solve.tangents + k) * samples + lane] =
              from[(k * setup_.batch + sample) * features + d];
        }
      }
    }
    if (setup_.context.defined()) {
      const int64_t width = solve.field.layer[0].out;
      const T* from = values<T>(setup_.context) + sample * width;
      for (int64_t i = 0; i < width; ++i) aligned(context_.data())[i * samples + lane] = from[i];
    }
  }

  MlpSolve<T> solve;

 private:
  const MlpSetup<T>& setup_;
  std::vector<T> probe_, context_;
};

// Rows [height, samples] of a tile.
template <typename T>
class LaneRows {
 public:
  LaneRows(const MlpSetup<T>& setup, int64_t height)
      : height_(height),
        samples_(setup.samples),
        memory_(std::max<int64_t>(1, height) * setup.samples + kAlign<T>) {}

  T* data() { return aligned(memory_.data()); }
  T& at(int64_t row, int64_t lane) { return data()[row * samples_ + lane]; }

  void fill(int64_t lane, T value) {
    for (int64_t row = 0; row < height_; ++row) at(row, lane) = value;
  }

  // `stride` is from row to row.
  void load(int64_t lane, const T* from, int64_t first, int64_t count, int64_t stride = 1) {
    for (int64_t i = 0; i < count; ++i) at(first + i, lane) = from[i * stride];
  }
  void store(int64_t lane, T* to, int64_t first, int64_t count, int64_t stride = 1) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = at(first + i, lane);
  }

 private:
  int64_t height_, samples_;
  std::vector<T> memory_;
};

// A step that a sample attempts.
struct LaneStep {
  double t, h, t_next;
  bool last;
};

// What a solve asks of the equations that it solves, for one tile.
template <typename T>
class SampleSystem {
 public:
  virtual ~SampleSystem() = default;
  virtual void first(const MlpAttempt<T>& attempt) = 0;
  virtual void trial(const MlpAttempt<T>& attempt) = 0;
  virtual void attempt(const MlpAttempt<T>& attempt) = 0;
  // Fills a lane of y with a sample at the start.
  virtual void load(int64_t lane, int64_t sample, LaneRows<T>& y) = 0;
  // Hears which lanes' steps were accepted, with the tile still at their start.
  virtual void accept(const std::vector<int64_t>& sample_of_lane,
                      const std::vector<LaneStep>& steps, const std::vector<char>& accepted,
                      const MlpAttempt<T>& attempt, LaneRows<T>& y) = 0;
  virtual void finish(int64_t lane, int64_t sample, LaneRows<T>& y) = 0;
  // Once all are done; the network at some time that is still there.
  virtual void end(const MlpAt<T>&) {}
};

struct Interval {
  double start, end;
  StepControl control;
};

// Solves one thread's samples.
template <typename T>
class SampleSolver {
 public:
  SampleSolver(const MlpSetup<T>& setup, SampleSystem<T>& system, const Interval& interval,
               int64_t rows, double second)
      : setup_(setup),
        tableau_(*setup.solve.tableau),
        system_(system),
        interval_(interval),
        rows_(rows),
        second_(second),
        length_(std::abs(interval.end - interval.start)),
        direction_(interval.end > interval.start ? 1 : -1),
        y0_(setup, rows),
        y1_(setup, rows),
        k_(setup, rows * tableau_.stages),
        h_(setup, 1),
        norms_(setup.samples),
        rates_(setup.samples),
        times_(kMaxStages * setup.samples, interval.start) {}

  Report report;

  void run(Share share, Interruption& interruption, int64_t chunk) {
    begin(share);
    if (report.status != Status::kDone) return;
    const int64_t samples = setup_.samples;
    std::vector<int64_t> sample_of(samples, -1);
    std::vector<LaneStep> steps(samples);
    std::vector<double> t(samples, interval_.start), size(samples, 0);
    std::vector<int64_t> accepted(samples, 0), rejected(samples, 0);
    std::vector<char> good(samples, 0);
    int64_t next = share.begin, active = 0;
    const auto refill = [&](int64_t lane) {
      sample_of[lane] = -1;
      if (next == share.end) return;
      const int64_t sample = next++;
      sample_of[lane] = sample;
      ++active;
      system_.load(lane, sample, y0_);
      k_.load(lane, &first_rates_[(sample - share.begin) * rows_], 0, rows_);
      t[lane] = interval_.start;
      size[lane] = first_sizes_[sample - share.begin];
      accepted[lane] = rejected[lane] = 0;
    };
    // Lanes that have nothing to do stand still on a sample of their own.
    for (int64_t lane = 0; lane < samples; ++lane) {
      system_.load(lane, share.begin, y0_);
      k_.load(lane, first_rates_.data(), 0, rows_);
      refill(lane);
    }
    while (active > 0 && interruption.go_on(chunk)) {
      for (int64_t lane = 0; lane < samples; ++lane) {
        auto& step = steps[lane];
        step = {t[lane], 0, t[lane], false};
        if (sample_of[lane] >= 0) {
          size[lane] = std::min(size[lane], interval_.control.max_step);
          const double left = std::abs(interval_.end - t[lane]);
          step.last = size[lane] >= left * (1 - kClose);
          step.h = direction_ * (step.last ? left : size[lane]);
          step.t_next = step.last ? interval_.end : t[lane] + step.h;
        }
        h_.at(0, lane) = T(step.h);
        for (int i = 0; i < tableau_.stages; ++i) {
          times_[i * samples + lane] = stage_time(tableau_, i, step.t, step.h, step.t_next);
        }
      }
      setup_.prepare(tableau_.stages, times_.data(), false, false, prepared_);
      const auto attempt = attempt_of(nullptr);
      system_.attempt(attempt);
      for (int64_t lane = 0; lane < samples; ++lane) {
        good[lane] = false;
        if (sample_of[lane] < 0) continue;
        double error = norm_of(norms_[lane], double(features()), second_);
        if (!std::isfinite(error)) error = INFINITY;
        good[lane] = error <= 1;
        ++(good[lane] ? accepted : rejected)[lane];
        size[lane] =
            std::abs(steps[lane].h) * step_factor(interval_.control, error, tableau_.order);
        if (good[lane] && steps[lane].last) continue;
        const bool exhausted = accepted[lane] + rejected[lane] >= interval_.control.max_num_steps;
        if (!exhausted && !(size[lane] < kTiny * length_)) continue;
        report.status = exhausted ? Status::kTooManySteps : Status::kUnderflow;
        report.time = good[lane] ? steps[lane].t_next : t[lane];
        report.size = size[lane];
        report.finite = std::isfinite(error);
        report.worst = sample_of[lane];
        return;
      }
      system_.accept(sample_of, steps, good, attempt, y0_);
      const int last = tableau_.stages - 1;
      bool fresh = false;
      for (int64_t lane = 0; lane < samples; ++lane) {
        if (!good[lane]) continue;
        t[lane] = steps[lane].t_next;
        for (int64_t row = 0; row < rows_; ++row) {
          y0_.at(row, lane) = y1_.at(row, lane);
          if (tableau_.solution_is_last_stage) {
            k_.at(row, lane) = k_.at(last * rows_ + row, lane);
          }
        }
        if (!steps[lane].last) {
          fresh = true;
          continue;
        }
        system_.finish(lane, sample_of[lane], y0_);
        report.accepted = std::max(report.accepted, accepted[lane]);
        report.rejected = std::max(report.rejected, rejected[lane]);
        attempts_ = std::max(attempts_, accepted[lane] + rejected[lane]);
        --active;
        good[lane] = false;  // its first stage is not wanted
        refill(lane);
      }
      if (!tableau_.solution_is_last_stage && fresh) first_of(good, t);
    }
    system_.end(prepared_.at[0]);
    report.evaluations = (interval_.control.first_step == 0 ? 2 : 1) +
                         (tableau_.stages - 1) * attempts_ +
                         (tableau_.solution_is_last_stage ? 0 : report.accepted - 1);
  }

 private:
  int64_t features() const { return setup_.solve.field.features; }

  MlpAttempt<T> attempt_of(SampleNorms* rates) {
    static T* const nothing[kMaxStages] = {};
    MlpAttempt<T> attempt = {};
    attempt.own_h = h_.data();
    attempt.rtol = T(interval_.control.rtol);
    attempt.atol = T(interval_.control.atol);
    attempt.at = prepared_.at.data();
    attempt.y0 = y0_.data();
    attempt.y1 = y1_.data();
    attempt.k = k_.data();
    attempt.tiles = 1;
    attempt.kept = nothing;
    attempt.norms = norms_.data();
    attempt.rates = rates;
    return attempt;
  }

  // The first rates and step sizes of all samples, tile by tile.
  void begin(Share share) {
    const int64_t samples = setup_.samples, count = share.end - share.begin;
    first_rates_.resize(count * rows_);
    first_sizes_.resize(count);
    for (int64_t at = share.begin; at < share.end; at += samples) {
      const int64_t live = std::min(samples, share.end - at);
      for (int64_t lane = 0; lane < samples; ++lane) {
        system_.load(lane, at + std::min(lane, live - 1), y0_);
        times_[lane] = interval_.start;
        h_.at(0, lane) = T(0);
      }
      setup_.prepare(1, times_.data(), false, false, prepared_);
      system_.first(attempt_of(rates_.data()));
      std::vector<double> h0(samples), d1(samples);
      for (int64_t lane = 0; lane < samples; ++lane) {
        const double d0 = norm_of(norms_[lane], double(features()), second_);
        d1[lane] = norm_of(rates_[lane], double(features()), second_);
        if (!finite(lane, at + lane)) return;
        h0[lane] = trial_step(d0, d1[lane], length_);
        h_.at(0, lane) = T(direction_ * h0[lane]);
        times_[lane] = interval_.start + direction_ * h0[lane];
      }
      for (int64_t lane = 0; lane < live; ++lane) {
        k_.store(lane, &first_rates_[(at - share.begin + lane) * rows_], 0, rows_);
        first_sizes_[at - share.begin + lane] = interval_.control.first_step;
      }
      if (interval_.control.first_step != 0) continue;
      setup_.prepare(1, times_.data(), false, false, prepared_);
      system_.trial(attempt_of(nullptr));
      for (int64_t lane = 0; lane < live; ++lane) {
        const double d2 = norm_of(norms_[lane], double(features()), second_) / h0[lane];
        first_sizes_[at - share.begin + lane] =
            std::isfinite(d2) ? initial_step(h0[lane], d1[lane], d2, tableau_.order, length_)
                              : h0[lane] * interval_.control.dfactor;
      }
    }
  }

  bool finite(int64_t lane, int64_t sample) {
    for (const bool rates : {false, true}) {
      for (int64_t row = 0; row < rows_; ++row) {
        if (std::isfinite((rates ? k_ : y0_).at(row, lane))) continue;
        report.status = rates ? Status::kFieldNotFinite : Status::kStateNotFinite;
        report.time = interval_.start;
        report.worst = sample;
        return false;
      }
    }
    return true;
  }

  // First stages at the new times of some lanes; the others keep theirs.
  void first_of(const std::vector<char>& wanted, const std::vector<double>& t) {
    const int64_t samples = setup_.samples;
    const std::vector<T> before(k_.data(), k_.data() + rows_ * samples);
    std::copy(t.begin(), t.end(), times_.begin());
    setup_.prepare(1, times_.data(), false, false, prepared_);
    system_.first(attempt_of(nullptr));
    for (int64_t lane = 0; lane < samples; ++lane) {
      if (!wanted[lane]) k_.load(lane, before.data() + lane, 0, rows_, samples);
    }
  }

  const MlpSetup<T>& setup_;
  const Tableau& tableau_;
  SampleSystem<T>& system_;
  const Interval& interval_;
  int64_t rows_;
  double second_;  // numbers of the norm's second part
  double length_, direction_;
  LaneRows<T> y0_, y1_, k_, h_;
  std::vector<SampleNorms> norms_, rates_;
  std::vector<double> times_;  // [stages, samples]
  MlpTimes<T> prepared_;
  std::vector<T> first_rates_;
  std::vector<double> first_sizes_;
  int64_t attempts_ = 0;
};

// Solves all samples, split over threads; returns the reports as one. `system_of(chunk)` makes a
// thread's equations.
template <typename T, typename MakeSystem>
Report solve_samples(const MlpSetup<T>& setup, const Interval& interval, int64_t rows,
                     double second, const MakeSystem& system_of) {
  std::vector<Report> reports(setup.chunks);
  Interruption interruption;
  setup.for_each_chunk([&](int64_t chunk) {
    const auto system = system_of(chunk);
    SampleSolver<T> solver(setup, *system, interval, rows, second);
    solver.run(share_of(setup, chunk), interruption, chunk);
    reports[chunk] = solver.report;
    if (solver.report.status != Status::kDone) interruption.stop();
  });
  Report all;
  for (const auto& one : reports) {
    if (one.status != Status::kDone && all.status == Status::kDone) {
      all.status = one.status;
      all.time = one.time;
      all.size = one.size;
      all.finite = one.finite;
      all.worst = one.worst;
    }
    all.accepted = std::max(all.accepted, one.accepted);
    all.rejected = std::max(all.rejected, one.rejected);
    all.evaluations = std::max(all.evaluations, one.evaluations);
  }
  return all;
}

// ---- forward ------------------------------------------------------------------------------------

// One thread's accepted steps.
template <typename T>
struct Tape {
  std::vector<double> times;      // [N, 4]: t, h, t_next, whether it is the last
  std::vector<T> states;          // [N, D]
  std::vector<int64_t> previous;  // [N], places in this tape
};

template <typename T>
class ForwardSystem : public SampleSystem<T> {
 public:
  ForwardSystem(const MlpSetup<T>& setup, const T* x, T* z, T* extras, Tape<T>* tape,
                int64_t* newest, T* memory)
      : setup_(setup),
        lanes_(setup),
        x_(x),
        z_(z),
        extras_(extras),
        tape_(tape),
        newest_(newest),
        memory_(memory) {}

  void first(const MlpAttempt<T>& attempt) override {
    setup_.steps.first_stage(lanes_.solve, attempt, 0, memory_);
  }
  void trial(const MlpAttempt<T>& attempt) override {
    setup_.steps.trial(lanes_.solve, attempt, 0, memory_);
  }
  void attempt(const MlpAttempt<T>& attempt) override {
    setup_.steps.attempt(lanes_.solve, attempt, 0, memory_);
  }

  void load(int64_t lane, int64_t sample, LaneRows<T>& y) override {
    lanes_.load(lane, sample);
    y.fill(lane, T(0));
    y.load(lane, x_ + sample * features(), 0, features());
  }

  void accept(const std::vector<int64_t>& sample_of_lane, const std::vector<LaneStep>& steps,
              const std::vector<char>& accepted, const MlpAttempt<T>&, LaneRows<T>& y) override {
    if (tape_ == nullptr) return;
    for (int64_t lane = 0; lane < setup_.samples; ++lane) {
      if (!accepted[lane]) continue;
      const auto& step = steps[lane];
      int64_t& newest = newest_[sample_of_lane[lane]];
      tape_->times.insert(tape_->times.end(), {step.t, step.h, step.t_next, double(step.last)});
      tape_->previous.push_back(newest);
      newest = int64_t(tape_->previous.size()) - 1;
      tape_->states.resize(tape_->states.size() + features());
      y.store(lane, &tape_->states[newest * features()], 0, features());
    }
  }

  void finish(int64_t lane, int64_t sample, LaneRows<T>& y) override {
    y.store(lane, z_ + sample * features(), 0, features());
    y.store(lane, extras_ + sample, features(), setup_.extras, setup_.batch);
  }

 private:
  int64_t features() const { return setup_.solve.field.features; }

  const MlpSetup<T>& setup_;
  Lanes<T> lanes_;
  const T* x_;
  T* z_;
  T* extras_;  // [E, B]
  Tape<T>* tape_;
  int64_t* newest_;
  T* memory_;
};

using SampleSolution =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

template <typename T>
SampleSolution solve_forward(const MlpSetup<T>& setup, const at::Tensor& x,
                             const Interval& interval, bool taped) {
  const int64_t features = setup.solve.field.features;
  auto z = at::empty({setup.batch, features}, setup.options);
  auto extras = at::empty({setup.extras, setup.batch}, setup.options);
  const auto whole = setup.options.dtype(at::kLong);
  auto newest = at::full({taped ? setup.batch : 0}, -1, whole);
  std::vector<Tape<T>> tapes(setup.chunks);
  const auto report = solve_samples(setup, interval, setup.rows, 1, [&](int64_t chunk) {
    return std::make_unique<ForwardSystem<T>>(
        setup, values<T>(x), mutable_values<T>(z), mutable_values<T>(extras),
        taped ? &tapes[chunk] : nullptr, newest.template mutable_data_ptr<int64_t>(),
        setup.memory_of(chunk));
  });
  // The threads' tapes one after another.
  int64_t count = 0;
  for (const auto& tape : tapes) count += int64_t(tape.previous.size());
  auto times = at::empty({count, 4}, setup.options.dtype(at::kDouble));
  auto states = at::empty({count, features}, setup.options);
  auto previous = at::empty({count}, whole);
  int64_t at = 0;
  for (int64_t chunk = 0; chunk < setup.chunks; ++chunk) {
    const auto& tape = tapes[chunk];
    const auto moved = [&](int64_t place) { return place < 0 ? place : place + at; };
    std::copy(tape.times.begin(), tape.times.end(),
              times.template mutable_data_ptr<double>() + 4 * at);
    std::copy(tape.states.begin(), tape.states.end(), mutable_values<T>(states) + features * at);
    std::transform(tape.previous.begin(), tape.previous.end(),
                   previous.template mutable_data_ptr<int64_t>() + at, moved);
    const auto share = share_of(setup, chunk);
    int64_t* last = newest.template mutable_data_ptr<int64_t>();
    for (int64_t b = share.begin; taped && b < share.end; ++b) last[b] = moved(last[b]);
    at += int64_t(tape.previous.size());
  }
  return {z, extras, report.tensor(), times, states, previous, newest};
}

SampleSolution mlp_samples_cpu(const at::Tensor& x, const std::optional<at::Tensor>& probe,
                               const std::optional<at::Tensor>& keys, at::IntArrayRef noise,
                               const std::optional<at::Tensor>& context,
                               const Parameters& parameters, std::string_view method,
                               at::IntArrayRef kind, at::ArrayRef<double> weights, double start,
                               double end, at::ArrayRef<double> control, bool taped) {
  SampleSolution solution;
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "mlp_samples", [&] {
    const MlpSetup<scalar_t> setup(
        x, {probe, keys, noise, context, parameters, method, kind, weights}, true);
    solution = solve_forward(setup, x.contiguous(), {start, end, read_control(control)}, taped);
  });
  return solution;
}

// ---- gradient -----------------------------------------------------------------------------------

using Gradient = std::tuple<at::Tensor, at::Tensor, std::vector<at::Tensor>, at::Tensor>;

template <typename T>
Gradient backward(const MlpSetup<T>& setup, const at::Tensor& z_bar, const at::Tensor& extras_bar,
                  const Parameters& parameters, const at::Tensor& times, const at::Tensor& states,
                  const at::Tensor& previous, const at::Tensor& newest, bool need_times) {
  const Tableau& tableau = *setup.solve.tableau;
  const int64_t features = setup.solve.field.features, width = setup.solve.field.layer[0].out;
  const int64_t samples = setup.samples;
  const double* time = times.const_data_ptr<double>();
  const int64_t* before = previous.const_data_ptr<int64_t>();
  const int64_t* newest_of = newest.const_data_ptr<int64_t>();
  auto x_bar = at::empty({setup.batch, features}, setup.options);
  auto context_bar = at::empty({setup.context.defined() ? setup.batch : 0, width}, setup.options);
  auto ends = at::zeros({need_times ? setup.batch : 0, 2}, setup.options.dtype(at::kDouble));
  GradientSums<T> sums(setup, 1);

  Interruption interruption;
  setup.for_each_chunk([&](int64_t chunk) {
    const auto share = share_of(setup, chunk);
    Lanes<T> lanes(setup);
    LaneRows<T> y(setup, features), bar(setup, features), extras(setup, setup.extras), h(setup, 1),
        context(setup, setup.context.defined() ? width : 0);
    MixedBars<T> mixed(setup, tableau.stages, true);
    MlpTimes<T> prepared;
    std::vector<double> stage_times(tableau.stages * samples), times_bar(2 * samples);
    std::vector<int64_t> sample_of(samples, -1), record_of(samples, -1);
    T* const nothing[kMaxStages] = {};
    int64_t next = share.begin, active = 0;
    const auto refill = [&](int64_t lane) {
      sample_of[lane] = -1;
      bar.fill(lane, T(0));
      extras.fill(lane, T(0));
      if (next == share.end) return;
      const int64_t sample = next++;
      sample_of[lane] = sample;
      record_of[lane] = newest_of[sample];
      ++active;
      lanes.load(lane, sample);
      bar.load(lane, values<T>(z_bar) + sample * features, 0, features);
      extras.load(lane, values<T>(extras_bar) + sample, 0, setup.extras, setup.batch);
      context.fill(lane, T(0));
    };
    for (int64_t lane = 0; lane < samples; ++lane) {
      lanes.load(lane, share.begin);
      record_of[lane] = newest_of[share.begin];
      refill(lane);
    }
    MlpReverseStep<T> step = {};
    step.own_h = h.data();
    step.y0 = y.data();
    step.rows = features;
    step.kept = nothing;
    step.extras_bar = extras.data();
    step.z_bar = bar.data();
    step.context_bar = setup.context.defined() ? context.data() : nullptr;
    step.times_bar = need_times ? times_bar.data() : nullptr;
    step.gradients = sums.layers(chunk, 0);
    step.mixed_bar = mixed.pointers();
    while (active > 0 && interruption.go_on(chunk)) {
      for (int64_t lane = 0; lane < samples; ++lane) {
        const double* of = time + 4 * record_of[lane];
        const bool idle = sample_of[lane] < 0;
        h.at(0, lane) = idle ? T(0) : T(of[1]);
        for (int i = 0; i < tableau.stages; ++i) {
          stage_times[i * samples + lane] =
              idle ? of[0] : stage_time(tableau, i, of[0], of[1], of[2]);
        }
        y.load(lane, values<T>(states) + record_of[lane] * features, 0, features);
      }
      setup.prepare(tableau.stages, stage_times.data(), need_times, false, prepared);
      step.at = prepared.at.data();
      setup.steps.reverse(lanes.solve, step, 0, setup.memory_of(chunk));
      for (int64_t lane = 0; lane < samples; ++lane) {
        const int64_t sample = sample_of[lane];
        if (sample < 0) continue;
        if (need_times) {
          double* of = ends.template mutable_data_ptr<double>() + 2 * sample;
          const bool last = time[4 * record_of[lane] + 3] != 0;
          of[0] += times_bar[lane] - (last ? times_bar[samples + lane] : 0);
          of[1] += last ? times_bar[samples + lane] : 0;
        }
        const int64_t earlier = before[record_of[lane]];
        if (earlier >= 0) {
          record_of[lane] = earlier;
          continue;
        }
        bar.store(lane, mutable_values<T>(x_bar) + sample * features, 0, features);
        if (setup.context.defined()) {
          context.store(lane, mutable_values<T>(context_bar) + sample * width, 0, width);
        }
        --active;
        refill(lane);
      }
    }
    if (!prepared.at.empty()) mixed.unmix(0, prepared.at[0], step.gradients);
  });

  sums.reduce(0);
  if (!setup.context.defined()) context_bar = at::empty({0}, setup.options);
  return {x_bar, context_bar, sums.tensors(sums.numbers(0, 0), parameters), ends.sum(0)};
}

// Cotangents of the extras [E, B]: zeros for none.
template <typename T>
at::Tensor filled(const MlpSetup<T>& setup, const std::optional<at::Tensor>& extras_bar) {
  if (extras_bar.has_value()) return extras_bar->contiguous();
  return at::zeros({setup.extras, setup.batch}, setup.options);
}

Gradient mlp_samples_backward_cpu(
    const at::Tensor& z_bar, const std::optional<at::Tensor>& extras_bar,
    const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& keys,
    at::IntArrayRef noise, const std::optional<at::Tensor>& context, const Parameters& parameters,
    std::string_view method, at::IntArrayRef kind, at::ArrayRef<double> weights,
    const at::Tensor& times, const at::Tensor& states, const at::Tensor& previous,
    const at::Tensor& newest, bool need_times) {
  Gradient result;
  AT_DISPATCH_FLOATING_TYPES(z_bar.scalar_type(), "mlp_samples_backward", [&] {
    MlpSetup<scalar_t> setup(
        z_bar, {probe, keys, noise, context, parameters, method, kind, weights}, true);
    setup.turn_weights();
    result = backward(setup, z_bar.contiguous(), filled(setup, extras_bar), parameters, times,
                      states, previous, newest, need_times);
  });
  return result;
}

// ---- adjoint ------------------------------------------------------------------------------------

template <typename T>
class AdjointSystem : public SampleSystem<T> {
 public:
  AdjointSystem(const MlpSetup<T>& setup, const T* z, const T* z_bar, const T* extras_bar, T* x_bar,
                T* context_bar, const LayerGradient<T>* gradients, T* memory)
      : setup_(setup),
        lanes_(setup),
        mixed_(setup, setup.solve.tableau->stages, true),
        extras_(setup, setup.extras),
        context_(setup, setup.context.defined() ? width() : 0),
        accepted_(setup, 1),
        z_(z),
        z_bar_(z_bar),
        extras_bar_(extras_bar),
        x_bar_(x_bar),
        context_bar_(context_bar),
        gradients_(gradients),
        memory_(memory) {
    for (int i = 0; i < kMaxStages; ++i) {
      sums_[i] = gradients;
      contexts_[i] = context_.data();
    }
  }

  void first(const MlpAttempt<T>& attempt) override {
    setup_.steps.adjoint_first(lanes_.solve, without_sums(attempt), 0, memory_);
  }
  void trial(const MlpAttempt<T>& attempt) override {
    // The kernel takes its network from stage 1.
    const MlpAt<T> at[2] = {attempt.at[0], attempt.at[0]};
    auto adjoint = without_sums(attempt);
    adjoint.attempt.at = at;
    setup_.steps.adjoint_trial(lanes_.solve, adjoint, 0, memory_);
  }
  void attempt(const MlpAttempt<T>& attempt) override {
    setup_.steps.adjoint_attempt(lanes_.solve, without_sums(attempt), 0, memory_);
  }

  void load(int64_t lane, int64_t sample, LaneRows<T>& y) override {
    lanes_.load(lane, sample);
    y.load(lane, z_ + sample * features(), 0, features());
    y.load(lane, z_bar_ + sample * features(), features(), features());
    extras_.load(lane, extras_bar_ + sample, 0, setup_.extras, setup_.batch);
    context_.fill(lane, T(0));
  }

  void accept(const std::vector<int64_t>&, const std::vector<LaneStep>& steps,
              const std::vector<char>& accepted, const MlpAttempt<T>& attempt,
              LaneRows<T>&) override {
    bool any = false;
    for (int64_t lane = 0; lane < setup_.samples; ++lane) {
      accepted_.at(0, lane) = accepted[lane] ? T(steps[lane].h) : T(0);
      any = any || accepted[lane];
    }
    if (!any) return;
    auto adjoint = without_sums(attempt);
    adjoint.gradients = sums_;
    if (setup_.context.defined()) adjoint.context_bar = contexts_;
    adjoint.attempt.own_h = accepted_.data();
    setup_.table.adjoint_quadrature(lanes_.solve, adjoint, attempt.own_h, 0, memory_);
  }

  void finish(int64_t lane, int64_t sample, LaneRows<T>& y) override {
    y.store(lane, x_bar_ + sample * features(), features(), features());
    if (!setup_.context.defined()) return;
    context_.store(lane, context_bar_ + sample * width(), 0, width());
  }

  void end(const MlpAt<T>& at) override { mixed_.unmix(0, at, gradients_); }

 private:
  int64_t features() const { return setup_.solve.field.features; }
  int64_t width() const { return setup_.solve.field.layer[0].out; }

  MlpAdjointAttempt<T> without_sums(const MlpAttempt<T>& attempt) {
    static const LayerGradient<T>* const none[kMaxStages] = {};
    MlpAdjointAttempt<T> adjoint = {};
    adjoint.attempt = attempt;
    adjoint.extras_bar = extras_.data();
    adjoint.gradients = none;
    adjoint.mixed_bar = mixed_.pointers();
    return adjoint;
  }

  const MlpSetup<T>& setup_;
  Lanes<T> lanes_;
  MixedBars<T> mixed_;
  LaneRows<T> extras_, context_, accepted_;
  const T *z_, *z_bar_, *extras_bar_;
  T *x_bar_, *context_bar_;
  const LayerGradient<T>* gradients_;
  T* memory_;
  const LayerGradient<T>* sums_[kMaxStages];
  T* contexts_[kMaxStages];
};

template <typename T>
Gradient adjoint(const MlpSetup<T>& setup, const at::Tensor& z, const at::Tensor& z_bar,
                 const at::Tensor& extras_bar, const Parameters& parameters,
                 const Interval& interval) {
  const int64_t features = setup.solve.field.features, width = setup.solve.field.layer[0].out;
  auto x_bar = at::empty({setup.batch, features}, setup.options);
  auto context_bar = at::empty({setup.context.defined() ? setup.batch : 0, width}, setup.options);
  GradientSums<T> sums(setup, 1);
  const auto report =
      solve_samples(setup, interval, 2 * features, double(features), [&](int64_t chunk) {
        return std::make_unique<AdjointSystem<T>>(
            setup, values<T>(z), values<T>(z_bar), values<T>(extras_bar), mutable_values<T>(x_bar),
            mutable_values<T>(context_bar), sums.layers(chunk, 0), setup.memory_of(chunk));
      });
  sums.reduce(0);
  if (!setup.context.defined()) context_bar = at::empty({0}, setup.options);
  return {x_bar, context_bar, sums.tensors(sums.numbers(0, 0), parameters), report.tensor()};
}

Gradient mlp_samples_adjoint_cpu(const at::Tensor& z, const at::Tensor& z_bar,
                                 const std::optional<at::Tensor>& extras_bar,
                                 const std::optional<at::Tensor>& probe,
                                 const std::optional<at::Tensor>& keys, at::IntArrayRef noise,
                                 const std::optional<at::Tensor>& context,
                                 const Parameters& parameters, std::string_view method,
                                 at::IntArrayRef kind, at::ArrayRef<double> weights, double start,
                                 double end, at::ArrayRef<double> control) {
  Gradient result;
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_samples_adjoint", [&] {
    MlpSetup<scalar_t> setup(z, {probe, keys, noise, context, parameters, method, kind, weights},
                             true);
    setup.every_stage_mixed = true;
    setup.turn_weights();
    result = adjoint(setup, z.contiguous(), z_bar.contiguous(), filled(setup, extras_bar),
                     parameters, {start, end, read_control(control)});
  });
  return result;
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("mlp_samples", mlp_samples_cpu);
  m.impl("mlp_samples_backward", mlp_samples_backward_cpu);
  m.impl("mlp_samples_adjoint", mlp_samples_adjoint_cpu);
}

}  // namespace pycnf
