// Step control of torchdiffeq's adaptive solver as pycnf/odeint/adaptive.py has it, for solves whose
// steps are chosen where the state is: one attempt after another, and no host in between.
#pragma once

#include <cmath>

#include "core/control.h"
#include "core/host_device.h"
#include "core/tableau.h"

namespace pycnf {

// Why a solve ended early.
enum class Failure { kNone, kTooManySteps, kUnderflow, kNonFinite };

// A solve between two attempts, and what the last one has come to. Whole numbers are f64 too, so
// that it is one tensor of f64; kAttemptFields names them.
struct Attempt {
  // The attempt that is next.
  double start;
  double size;
  double end;
  double clipped;  // the end was prescribed
  double finite;   // the state there
  // The last one, if it was accepted.
  double accepted_now;
  double from;
  double to;
  double first_output;  // [first, last) of the output times lie in it
  double last_output;
  // So far.
  double taken;  // attempts since the last output
  double attempts;
  double accepted;
  double rejected;
  double output;  // the next one
  double stop;    // the next one
  double done;
  double failure;
  // Between the two halves of the choice of the first step.
  double first_trial;
  double slope_norm;
};
constexpr int kAttemptNumbers = sizeof(Attempt) / sizeof(double);
constexpr const char* kAttemptFields[] = {
    "start",  "size",         "end",         "clipped", "finite",      "accepted_now", "from",
    "to",     "first_output", "last_output", "taken",   "attempts",    "accepted",     "rejected",
    "output", "stop",         "done",        "failure", "first_trial", "slope_norm",
};
static_assert(sizeof(kAttemptFields) / sizeof(kAttemptFields[0]) == kAttemptNumbers);

// What does not change from attempt to attempt.
struct StepRule {
  double safety;
  double ifactor;
  double dfactor;
  double min_step;
  double max_step;
  double max_num_steps;
  int order;
  int sign;    // of time
  bool plain;  // tolerances are numbers, so the error is in the state's dtype
  int nodes;   // stages
  double c[kMaxStages];
};

// Where an attempt lives. State is the dtype of states, Time that of times.
template <typename State>
struct AttemptPlan {
  StepRule rule;
  const double* outputs;  // [output_count] ascending times
  int64_t output_count;
  const double* stops;  // [stop_count] ascending times after the start, which steps must not cross
  int64_t stop_count;
  Attempt* attempt;
  State* times;  // [nodes] of the stages, as the user counts them
  State* h;      // [2]: the step of the attempt that is next, and of the accepted one
  // In memory of the host, to be read while the solve runs: attempts, ended, failure, accepted, and
  // the sizes of accepted steps, as far as there is room.
  double* report;
  int64_t report_count;
};

// Numbers of a report before the sizes.
constexpr int kReportNumbers = 4;

template <typename T>
PYCNF_HD bool is_nan(T x) {
  return x != x;
}

template <typename State>
PYCNF_HD State next_number(State x, State toward) {
  if constexpr (sizeof(State) == sizeof(float)) {
    return nextafterf(x, toward);
  } else {
    return nextafter(x, toward);
  }
}

// A size between the limits; NaN if one of the three is.
PYCNF_HD double clamp_size(const StepRule& rule, double size) {
  if (is_nan(size) || is_nan(rule.min_step) || is_nan(rule.max_step)) {
    return double(NAN);
  }
  const double above = size > rule.min_step ? size : rule.min_step;
  return above < rule.max_step ? above : rule.max_step;
}

// An I controller that never shrinks an accepted step. All numbers are of Time.
template <typename Time>
PYCNF_HD double next_size(const StepRule& rule, double size, double error) {
  if (error == 0) return clamp_size(rule, double(Time(size) * Time(rule.ifactor)));
  if (is_nan(error)) return double(NAN);
  const Time dfactor = error < 1 ? Time(1) : Time(rule.dfactor);
  const Time exponent = Time(1. / rule.order);
  const Time factor = Time(rule.safety) / Time(pow(double(Time(error)), double(exponent)));
  if (is_nan(factor) || is_nan(dfactor) || is_nan(rule.ifactor)) {
    return double(NAN);
  }
  const Time above = factor > dfactor ? factor : dfactor;
  const Time growth = Time(rule.ifactor) < above ? Time(rule.ifactor) : above;
  return clamp_size(rule, double(Time(size) * growth));
}

// Settles size and end of the next attempt, and what the field and the kernels are given.
template <typename Time, typename State>
PYCNF_HD void prepare_attempt(const AttemptPlan<State>& plan) {
  Attempt& a = *plan.attempt;
  const StepRule& rule = plan.rule;
  if (a.taken >= rule.max_num_steps) {
    a.failure = double(Failure::kTooManySteps);
    return;
  }
  a.taken += 1;
  if (!is_finite_number(a.size)) a.size = rule.min_step;
  if (!(rule.min_step <= a.size && a.size <= rule.max_step)) a.size = clamp_size(rule, a.size);
  a.end = double(Time(a.start) + Time(a.size));
  if (!(a.end > a.start)) {
    a.failure = double(Failure::kUnderflow);
    return;
  }
  if (a.finite == 0) {
    a.failure = double(Failure::kNonFinite);
    return;
  }
  a.clipped = 0;
  if (plan.stop_count > 0) {
    const double stop = plan.stops[int64_t(a.stop)];
    if (a.start < stop && stop < a.end) {
      a.clipped = 1;
      a.end = stop;
      a.size = double(Time(a.end) - Time(a.start));
    }
  }
  const State start = State(a.start), size = State(a.size);
  plan.h[0] = State(rule.sign) * size;
  for (int stage = 0; stage < rule.nodes; ++stage) {
    State s = start + State(rule.c[stage]) * size;
    if (rule.c[stage] == 1.) {
      const State end = State(a.end);
      s = next_number(end, end - State(1));
    }
    plan.times[stage] = State(rule.sign) * s;
  }
}

// What was written before is seen by the host before what comes after.
PYCNF_HD void publish() {
#if defined(__CUDA_ARCH__)
  __threadfence_system();
#endif
}

// The end is told last: who sees it, and looks again, sees all.
template <typename State>
PYCNF_HD void report(const AttemptPlan<State>& plan) {
  const Attempt& a = *plan.attempt;
  volatile double* report = plan.report;
  report[0] = a.attempts;
  report[2] = a.failure;
  report[3] = a.accepted;
  publish();
  report[1] = a.done != 0 || a.failure != 0 ? 1 : 0;
}

// Accepts an attempt or not, by its error norm and whether it ended in finite numbers, and prepares
// the next.
template <typename Time, typename State>
PYCNF_HD void decide_attempt(const AttemptPlan<State>& plan, double norm, bool finite) {
  Attempt& a = *plan.attempt;
  const StepRule& rule = plan.rule;
  a.accepted_now = 0;
  if (a.done != 0 || a.failure != 0) return;
  const double error = rule.plain ? double(State(norm)) : double(Time(norm));
  a.attempts += 1;
  const double size = a.size;
  if ((error <= 1 && size <= rule.max_step) || size <= rule.min_step) {
    a.accepted_now = 1;
    a.from = a.start;
    a.to = a.end;
    plan.h[1] = plan.h[0];
    a.first_output = a.output;
    int64_t output = int64_t(a.output);
    while (output < plan.output_count && plan.outputs[output] <= a.end) ++output;
    a.last_output = a.output = double(output);
    if (a.last_output > a.first_output) a.taken = 0;
    const int64_t place = kReportNumbers + int64_t(a.accepted);
    if (place < plan.report_count) plan.report[place] = size;
    a.accepted += 1;
    a.start = a.end;
    a.finite = finite ? 1 : 0;
    if (a.clipped != 0 && a.stop + 1 < double(plan.stop_count)) a.stop += 1;
    if (output >= plan.output_count) a.done = 1;
  } else {
    a.rejected += 1;
  }
  a.size = next_size<Time>(rule, size, error);
  if (a.done == 0) prepare_attempt<Time>(plan);
  report(plan);
}

// Where an output time lies in the accepted step, from 0 to 1.
template <typename Time, typename State>
PYCNF_HD State step_point(const Attempt& a, double output) {
  return State((Time(output) - Time(a.from)) / (Time(a.to) - Time(a.from)));
}

// Hairer, Norsett & Wanner, Solving ODEs I, II.4: the size of the trial step, from the norms of the
// state and of its derivative. Time is the dtype of the scaled error.
template <typename Error>
PYCNF_HD double trial_size(double state_norm, double slope_norm) {
  const Error d0 = Error(state_norm), d1 = Error(slope_norm);
  if (double(d0) < 1e-5 || double(d1) < 1e-5) return double(Error(1e-6));
  return double(Error(Error(0.01) * d0) / d1);
}

template <typename Error>
PYCNF_HD double first_size(double trial, double slope_norm, double difference_norm, int order) {
  const double infinite = double(INFINITY);
  const Error h0 = Error(trial), d1 = Error(slope_norm);
  const Error d2 = h0 != Error(0) ? Error(difference_norm) / h0 : Error(infinite);
  Error h1;
  if (double(d1) <= 1e-15 && double(d2) <= 1e-15) {
    const Error least = Error(1e-6), small = h0 * Error(1e-3);
    h1 = small > least ? small : least;
  } else {
    const Error larger = d2 > d1 ? d2 : d1;
    h1 = Error(pow(double(Error(0.01) / larger), double(Error(1. / order))));
  }
  const Error most = Error(100) * h0;
  return double(is_nan(h1) ? h1 : h1 < most ? h1 : most);
}

// The first half of the choice of the first step: where the trial goes. outputs[0] is the start.
template <typename Time, typename State>
PYCNF_HD void begin_attempts(const AttemptPlan<State>& plan, double state_norm, double slope_norm) {
  Attempt& a = *plan.attempt;
  const StepRule& rule = plan.rule;
  a.slope_norm = slope_norm;
  a.first_trial = rule.plain ? trial_size<State>(state_norm, slope_norm)
                             : trial_size<Time>(state_norm, slope_norm);
  const State trial = State(a.first_trial);
  plan.h[0] = State(rule.sign) * trial;
  plan.times[0] = State(rule.sign) * State(double(Time(a.start) + Time(a.first_trial)));
}

// The second half.
template <typename Time, typename State>
PYCNF_HD void choose_first_step(const AttemptPlan<State>& plan, double difference_norm) {
  Attempt& a = *plan.attempt;
  const StepRule& rule = plan.rule;
  a.size = double(Time(
      rule.plain ? first_size<State>(a.first_trial, a.slope_norm, difference_norm, rule.order)
                 : first_size<Time>(a.first_trial, a.slope_norm, difference_norm, rule.order)));
}

// What is to be settled: the trial of the first step, the first step, or an attempt.
enum class Moment { kBegin, kFirstStep, kDecide };

// `norms`: what rk_initial_norms or rk_finish has given; null where the first step's size is there.
template <typename Time, typename State>
PYCNF_HD void control_attempt(Moment moment, const AttemptPlan<State>& plan, const double* norms) {
  if (moment == Moment::kBegin) {
    begin_attempts<Time>(plan, norms[0], norms[1]);
  } else if (moment == Moment::kFirstStep) {
    if (norms != nullptr) choose_first_step<Time>(plan, norms[0]);
    prepare_attempt<Time>(plan);
    report(plan);
  } else {
    decide_attempt<Time>(plan, norms[0], norms[1] != 0);
  }
}

}  // namespace pycnf
