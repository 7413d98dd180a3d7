// The loop over steps that all samples share: how a solve begins, grows its steps and ends.
#pragma once

#include <ATen/ATen.h>

#include <cmath>
#include <vector>

#include "core/mlp_solve.h"
#include "torch/interrupt.h"
#include "torch/mlp_report.h"

namespace pycnf {

// The error norm of a sample: the larger RMS of its two parts, of the sizes given.
inline double norm_of(const SampleNorms& norms, double first, double second) {
  const double a = std::sqrt(norms.first / first), b = std::sqrt(norms.second / second);
  return std::isnan(a) || std::isnan(b) ? INFINITY : std::max(a, b);
}

inline int64_t worst_of(const std::vector<SampleNorms>& norms, int64_t batch, double first,
                        double second) {
  int64_t worst = 0;
  double largest = -1;
  for (int64_t b = 0; b < batch; ++b) {
    const double error = norm_of(norms[b], first, second);
    if (error > largest) {
      largest = error;
      worst = b;
    }
  }
  return worst;
}

// The first sample with a number that is not finite in rows [B, width]; -1 for none.
template <typename T>
int64_t first_not_finite(const at::Tensor& rows) {
  const T* value = rows.const_data_ptr<T>();
  for (int64_t i = 0; i < rows.numel(); ++i) {
    if (!std::isfinite(value[i])) return i / rows.size(1);
  }
  return -1;
}

// A System solves: `first(t, d0, d1)` evaluates the first stage, and the norms of state and rates;
// `trial(t, h)` is the norm of the rates' change; `attempt(t, h, t_next)` the norm of the error;
// `accept(t, h, t_next)` moves to the end of the attempted step; `advance(t)` has the first stage
// there; `worst()` is the sample with the largest error; `not_finite(rates)` one whose state or
// rates at the start are not finite, or -1. It counts in `report`.
template <typename System>
bool begins_finite(System& system, double t, double d0, double d1) {
  if (std::isfinite(d0) && std::isfinite(d1)) return true;
  for (const bool rates : {false, true}) {
    const int64_t sample = system.not_finite(rates);
    if (sample < 0) continue;
    system.report.status = rates ? Status::kFieldNotFinite : Status::kStateNotFinite;
    system.report.time = t;
    system.report.worst = sample;
    return false;
  }
  return true;
}

template <typename System>
void solve_adaptive(System& system, const Tableau& tableau, const StepControl& control,
                    double start, double end) {
  Report& report = system.report;
  const double length = std::abs(end - start), direction = end > start ? 1 : -1;
  double d0, d1;
  system.first(start, d0, d1);
  if (!begins_finite(system, start, d0, d1)) return;
  double size = control.first_step;
  if (size == 0) {
    const double h0 = trial_step(d0, d1, length);
    const double d2 = system.trial(start + direction * h0, direction * h0) / h0;
    size =
        std::isfinite(d2) ? initial_step(h0, d1, d2, tableau.order, length) : h0 * control.dfactor;
  }
  double t = start;
  while (true) {
    check_interrupt();
    const double left = std::abs(end - t);
    size = std::min(size, control.max_step);
    const bool last = size >= left * (1 - kClose);
    const double taken = last ? left : size;
    const double t_next = last ? end : t + direction * taken;
    const bool exhausted = report.accepted + report.rejected + 1 >= control.max_num_steps;
    double error = system.attempt(t, direction * taken, t_next);
    if (!std::isfinite(error)) error = INFINITY;
    const double grown = taken * step_factor(control, error, tableau.order);
    ++(error <= 1 ? report.accepted : report.rejected);
    if (!(error <= 1 && last) && (exhausted || grown < kTiny * length)) {
      report.status = exhausted ? Status::kTooManySteps : Status::kUnderflow;
      report.time = exhausted && error <= 1 ? t_next : t;
      report.size = grown;
      report.finite = std::isfinite(error);
      report.worst = system.worst();
      return;
    }
    if (error <= 1) {
      system.accept(t, direction * taken, t_next);
      if (last) {
        report.step_size = std::max(size, grown);
        return;
      }
      t = t_next;
      system.advance(t);
    }
    size = grown;
  }
}

template <typename System>
void solve_fixed(System& system, at::ArrayRef<double> grid) {
  TORCH_CHECK(grid.size() >= 2, "grid must have at least two times, got ", grid.size());
  Report& report = system.report;
  for (size_t i = 0; i + 1 < grid.size(); ++i) {
    check_interrupt();
    const double t = grid[i], h = grid[i + 1] - grid[i];
    if (i == 0) {
      double d0, d1;
      system.first(t, d0, d1);
      if (!begins_finite(system, t, d0, d1)) return;
    } else {
      system.advance(t);
    }
    if (!std::isfinite(system.attempt(t, h, grid[i + 1]))) {
      report.status = Status::kUnderflow;
      report.time = grid[i + 1];
      report.size = h;
      report.finite = false;
      report.worst = system.worst();
      return;
    }
    ++report.accepted;
    system.accept(t, h, grid[i + 1]);
  }
  report.step_size = std::abs(grid[grid.size() - 1] - grid[grid.size() - 2]);
}

}  // namespace pycnf
