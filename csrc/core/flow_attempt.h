// The flows' adaptive solve as pycnf/flows/shared.py has it, for solves whose steps are chosen
// where the state is: one attempt after another, and no host in between. Its accepted steps are
// read again, last first, for the gradient.
#pragma once

#include <cmath>

#include "core/attempt.h"
#include "core/control.h"
#include "core/host_device.h"
#include "core/tableau.h"

namespace pycnf {

// Why a solve ended early. Whatever it is, the solver with the host in its loop says it in words.
enum class FlowFailure { kNone, kFullTape, kOther };

// A solve between two attempts. Whole numbers are f64 too, so that it is one tensor of f64;
// kFlowFields names them.
struct FlowAttempt {
  // Given at the start of a solve. `size` only where the first step's is.
  double t;
  double size;
  double end;
  double length;
  double direction;  // of time, 1 or -1
  double finite;     // the state and its derivative at the start
  double recalled;   // the tape's step that was read last
  // The attempt that is next.
  double h;  // signed
  double t_next;
  double last;  // it would end the solve
  // So far.
  double accepted_now;  // the last attempt was accepted
  double accepted;
  double rejected;
  double done;
  double failure;
  // Between the two halves of the choice of the first step.
  double first_trial;
  double slope_norm;
};
constexpr int kFlowNumbers = sizeof(FlowAttempt) / sizeof(double);
constexpr const char* kFlowFields[] = {
    "t",        "size", "end",     "length",      "direction",    "finite",
    "recalled", "h",    "t_next",  "last",        "accepted_now", "accepted",
    "rejected", "done", "failure", "first_trial", "slope_norm",
};
static_assert(sizeof(kFlowFields) / sizeof(kFlowFields[0]) == kFlowNumbers);

// What does not change from attempt to attempt.
struct FlowRule {
  StepControl control;
  int order;
  int nodes;  // stages
  double c[kMaxStages];
};

// Where an attempt lives. State is the dtype of states.
template <typename State>
struct FlowPlan {
  FlowRule rule;
  FlowAttempt* attempt;
  State* times;      // [nodes] of the stages
  State* h;          // [1] of the attempt
  double* tape;      // [capacity, 3]: t, h and t_next of the accepted steps; null: somebody else's
  int64_t capacity;  // 0 where they are not kept
  // In memory of the host, to be read while the solve runs: attempts, ended, failure, accepted, and
  // what the next step's size would be. Null where another tells it.
  double* report;
};

constexpr int kFlowReportNumbers = 5;

// The end is told last: who sees it, and looks again, sees all.
template <typename State>
PYCNF_HD void report(const FlowPlan<State>& plan) {
  if (plan.report == nullptr) return;
  const FlowAttempt& a = *plan.attempt;
  volatile double* report = plan.report;
  report[0] = a.accepted + a.rejected;
  report[2] = a.failure;
  report[3] = a.accepted;
  report[4] = a.size;
  publish();
  report[1] = a.done != 0 || a.failure != 0 ? 1 : 0;
}

// Tells the field and the kernels of the step at hand.
template <typename State>
PYCNF_HD void set_step(const FlowPlan<State>& plan) {
  const FlowAttempt& a = *plan.attempt;
  plan.h[0] = State(a.h);
  for (int stage = 0; stage < plan.rule.nodes; ++stage) {
    const double c = plan.rule.c[stage];
    plan.times[stage] = State(c == 1 ? a.t_next : a.t + c * a.h);
  }
}

// Settles size and end of the next attempt.
template <typename State>
PYCNF_HD void prepare_step(const FlowPlan<State>& plan) {
  FlowAttempt& a = *plan.attempt;
  const double left = fabs(a.end - a.t);
  a.size = smaller(a.size, plan.rule.control.max_step);
  const bool last = a.size >= left * (1 - kClose);
  a.last = last ? 1 : 0;
  a.h = a.direction * (last ? left : a.size);
  a.t_next = last ? a.end : a.t + a.h;
  set_step(plan);
}

// The first half of the choice of the first step: where the trial goes.
template <typename State>
PYCNF_HD void begin_flow(const FlowPlan<State>& plan, double state_norm, double slope_norm) {
  FlowAttempt& a = *plan.attempt;
  a.slope_norm = slope_norm;
  a.first_trial = trial_step(state_norm, slope_norm, a.length);
  plan.h[0] = State(a.direction * a.first_trial);
  plan.times[0] = State(a.t + a.direction * a.first_trial);
}

// The second half; `difference_norm` null where the first step's size is given.
template <typename State>
PYCNF_HD void choose_first_step(const FlowPlan<State>& plan, const double* difference_norm) {
  FlowAttempt& a = *plan.attempt;
  if (difference_norm != nullptr) {
    const double h0 = a.first_trial, d2 = *difference_norm / h0;
    a.size = is_finite_number(d2) ? initial_step(h0, a.slope_norm, d2, plan.rule.order, a.length)
                                  : h0 * plan.rule.control.dfactor;
  }
  if (a.finite == 0) a.failure = double(FlowFailure::kOther);
  prepare_step(plan);
  report(plan);
}

// Accepts an attempt or not, by its error norm and whether it ended in finite numbers, and prepares
// the next.
template <typename State>
PYCNF_HD void decide_step(const FlowPlan<State>& plan, double norm, bool finite) {
  FlowAttempt& a = *plan.attempt;
  const FlowRule& rule = plan.rule;
  a.accepted_now = 0;
  if (a.done != 0 || a.failure != 0) return;
  const double error = finite && is_finite_number(norm) ? norm : double(INFINITY);
  const double grown = fabs(a.h) * step_factor(rule.control, error, rule.order);
  const bool full = plan.capacity > 0 && a.accepted >= double(plan.capacity);
  if (error <= 1 && full) {
    a.failure = double(FlowFailure::kFullTape);
    report(plan);
    return;
  }
  if (error <= 1) {
    if (plan.tape != nullptr) {
      double* step = plan.tape + 3 * int64_t(a.accepted);
      step[0] = a.t;
      step[1] = a.h;
      step[2] = a.t_next;
    }
    a.accepted_now = 1;
    a.accepted += 1;
    a.t = a.t_next;
  } else {
    a.rejected += 1;
  }
  if (error <= 1 && a.last != 0) {
    a.size = larger(a.size, grown);
    a.done = 1;
  } else if (a.accepted + a.rejected >= double(rule.control.max_num_steps) ||
             grown < kTiny * a.length) {
    a.failure = double(FlowFailure::kOther);
  } else {
    a.size = grown;
    prepare_step(plan);
  }
  report(plan);
}

// Goes one step back on the tape.
template <typename State>
PYCNF_HD void recall_step(const FlowPlan<State>& plan) {
  FlowAttempt& a = *plan.attempt;
  if (a.recalled < 1) return;
  a.recalled -= 1;
  const double* step = plan.tape + 3 * int64_t(a.recalled);
  a.t = step[0];
  a.h = step[1];
  a.t_next = step[2];
  set_step(plan);
}

// What is to be settled: the trial of the first step, the first step, an attempt, or which step is
// read again.
enum class FlowMoment { kBegin, kFirstStep, kDecide, kRecall };

// `norms`: what rk_initial_norms or rk_finish has given; null where nothing depends on them.
template <typename State>
PYCNF_HD void control_flow(FlowMoment moment, const FlowPlan<State>& plan, const double* norms) {
  if (moment == FlowMoment::kBegin) {
    begin_flow(plan, norms[0], norms[1]);
  } else if (moment == FlowMoment::kFirstStep) {
    choose_first_step(plan, norms);
  } else if (moment == FlowMoment::kDecide) {
    decide_step(plan, norms[0], norms[1] != 0);
  } else {
    recall_step(plan);
  }
}

}  // namespace pycnf
