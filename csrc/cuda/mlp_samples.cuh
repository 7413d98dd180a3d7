// The fused engine's solve with steps of the samples' own, in one launch: a block takes a tile of
// samples from start to end, then the next tile that nobody has begun. Blocks do not wait for each
// other; within a tile the samples that have ended wait for the others.

#pragma once

#include "cuda/mlp_kernel.cuh"
#include "cuda/mlp_plan.cuh"

namespace pycnf {
namespace {

// What stands at the beginning of a block's shared memory, before the numbers of TileLayout.
template <typename T>
struct Lanes {
  Weights<T> weights;
  FlowAttempt attempt[kMostSamples];
  T times[kMostSamples][kMaxStages];
  T h[kMostSamples];
  int64_t row[kMostSamples];  // of a sample's newest step on the tape, -1 for none
  int64_t tile;
  int running;  // samples that have not ended
};

// A block's part in a solve.
template <typename T, Precision kPrecision>
class SampleSolver {
 public:
  __device__ explicit SampleSolver(const MlpSamplesParams<T>& p)
      : p_(p),
        tableau_(p.tile.tableau),
        layout_(p.tile.layout),
        lanes_(*shared_memory<Lanes<T>>()),
        numbers_(shared_memory<T>() + kControlNumbers<Lanes<T>, T>),
        rows_(int(state_rows(p.tile.solve))),
        in_norm_(rows_in_norm(p.tile.solve)) {
    load_method(tableau_, lanes_.weights);
    load_weights(solve(), layout_, numbers_);
  }

  __device__ void run() {
    while (true) {
      barrier();
      if (threadIdx.x == 0) lanes_.tile = int64_t(atomicAdd(&p_.counts->tiles, 1ull));
      barrier();
      if (lanes_.tile >= p_.tile.tiles) break;
      const Tile<T> tile = {solve(), p_.tile.noise, layout_, numbers_, p_.tile.batch, lanes_.tile};
      begin(tile);
      for (bool first = false; running(); first = !tableau_.solution_is_last_stage) {
        attempt(tile, first ? 0 : 1);
        for_each_lane(tile, [&](int s) { decide(s, error_norms(tile, s)); });
        accept(tile);
      }
      store(tile);
    }
    finish();
  }

 private:
  __device__ const MlpSolve<T>& solve() const { return p_.tile.solve; }
  __device__ bool adaptive_first_step() const { return p_.rule.control.first_step == 0; }

  __device__ FlowPlan<T> plan(int s) const {
    FlowPlan<T> plan = {};
    plan.rule = p_.rule;
    plan.attempt = &lanes_.attempt[s];
    plan.times = lanes_.times[s];
    plan.h = &lanes_.h[s];
    return plan;
  }

  // Calls body(s) for every sample, a thread each; ends with a barrier.
  template <typename Body>
  __device__ void for_each_lane(const Tile<T>& tile, const Body& body) const {
    for_each_place(1, tile.samples(), [&](int, int s) {
      if (tile.counts(s)) body(s);
    });
    barrier();
  }

  __device__ T* scratch(int which) const {
    const int64_t numbers = int64_t(rows_) * layout_.samples;
    return p_.scratch + (blockIdx.x * int64_t(2 + tableau_.stages) + which) * numbers;
  }

  __device__ T* y0() const { return scratch(0); }
  __device__ T* y1() const { return scratch(1); }
  __device__ StageRows<T> k() const { return {scratch(2), int64_t(rows_) * layout_.samples, 0}; }

  __device__ void set_time(int i) const {
    pycnf::set_time(solve(), layout_, numbers_, lanes_.times[0] + i, kMaxStages);
  }

  // Everybody looks before anybody goes on and writes.
  __device__ bool running() const {
    const bool on = lanes_.running > 0;
    barrier();
    return on;
  }

  // The state at the start, its derivative, and the size of the first step.
  __device__ void begin(const Tile<T>& tile) const {
    const int features = tile.features(), samples = tile.samples();
    make_keys(tile);
    T* const y = y0();
    for_each_place(rows_, samples, [&](int row, int s) {
      y[row * samples + s] = row < features ? p_.x[tile.sample(s) * features + row] : T(0);
    });
    for_each_place(1, samples, [&](int, int s) {
      FlowAttempt& a = lanes_.attempt[s];
      a = attempt_at_start(p_.start, p_.end, p_.rule.control.first_step);
      // Copies of the last sample have nothing to do.
      a.done = tile.counts(s) ? 0 : 1;
      for (int i = 0; i < tableau_.stages; ++i) lanes_.times[s][i] = T(p_.start);
      lanes_.h[s] = T(0);
      lanes_.row[s] = -1;
    });
    if (threadIdx.x == 0) lanes_.running = 0;
    barrier();
    set_time(0);
    evaluate_stage(tile, 0);
    for_each_lane(tile, [&](int s) {
      FlowAttempt& a = lanes_.attempt[s];
      const TilePartial state = start_norms(s, y0()), slope = start_norms(s, k().row(0));
      a.finite = state.nonfinite + slope.nonfinite == 0 ? 1 : 0;
      if (adaptive_first_step()) begin_flow(plan(s), norm(state), norm(slope));
    });
    if (adaptive_first_step()) {
      set_time(0);
      trial(tile);
    }
    for_each_lane(tile, [&](int s) {
      double difference = 0;
      if (adaptive_first_step()) {
        const TilePartial changed = change_norms(s);
        difference = changed.nonfinite == 0 ? norm(changed) : double(INFINITY);
      }
      choose_first_step(plan(s), adaptive_first_step() ? &difference : nullptr);
      count(s);
    });
  }

  // Counts those that have not ended.
  __device__ void count(int s) const {
    const FlowAttempt& a = lanes_.attempt[s];
    if (a.done == 0 && a.failure == 0) atomicAdd(&lanes_.running, 1);
  }

  __device__ void trial(const Tile<T>& tile) const {
    const T euler[1] = {T(1)};
    stage_state(tile, euler, 1);
    evaluate<kPrecision>(tile, solve().tangents > 0, tile.at(layout_.z), k().row(1));
  }

  // The state z that a stage is evaluated at.
  __device__ void stage_state(const Tile<T>& tile, const T* weights, int count) const {
    const int samples = tile.samples();
    const T* const y = y0();
    T* const z = tile.at(layout_.z);
    const auto slopes = k();
    for_each_place(tile.features(), samples, [&](int d, int s) {
      const int i = d * samples + s;
      z[i] = y[i] + lanes_.h[s] * combined(slopes, weights, count, i);
    });
  }

  __device__ void evaluate_stage(const Tile<T>& tile, int i) const {
    stage_state(tile, lanes_.weights.a[i], i);
    evaluate<kPrecision>(tile, needs_divergence(solve(), tableau_, i), tile.at(layout_.z),
                         k().row(i));
  }

  // The stages from `first` on, and the solution.
  __device__ void attempt(const Tile<T>& tile, int first) const {
    for (int i = first; i < tableau_.stages; ++i) {
      set_time(i);
      evaluate_stage(tile, i);
    }
    const int samples = tile.samples();
    const auto slopes = k();
    T* const next = y1();
    const T* const y = y0();
    for_each_place(rows_, samples, [&](int row, int s) {
      const int i = row * samples + s;
      next[i] = y[i] + lanes_.h[s] * combined(slopes, lanes_.weights.b, tableau_.stages, i);
    });
    if (threadIdx.x == 0) lanes_.running = 0;
    barrier();
  }

  // Of one sample.
  __device__ double norm(const TilePartial& sums) const {
    return norm_of(solve(), sums.z, sums.logdet, 1);
  }

  // Of the state, or of its derivative.
  __device__ TilePartial start_norms(int s, const T* of) const {
    TilePartial sums = {};
    for (int row = 0; row < rows_; ++row) {
      const int i = row * layout_.samples + s;
      add_square(solve(), row, of[i] / (p_.atol + p_.rtol * magnitude(y0()[i])), of[i], sums);
    }
    return sums;
  }

  __device__ TilePartial change_norms(int s) const {
    TilePartial sums = {};
    for (int row = 0; row < in_norm_; ++row) {
      const int i = row * layout_.samples + s;
      const T change = k().row(1)[i] - k().row(0)[i];
      add_square(solve(), row, change / (p_.atol + p_.rtol * magnitude(y0()[i])), change, sums);
    }
    return sums;
  }

  __device__ TilePartial error_norms(const Tile<T>& tile, int s) const {
    TilePartial sums = {};
    const auto slopes = k();
    for (int row = 0; row < rows_; ++row) {
      const int i = row * tile.samples() + s;
      const T error = lanes_.h[s] * combined(slopes, lanes_.weights.e, tableau_.stages, i);
      const T scale = p_.atol + p_.rtol * larger_magnitude(y0()[i], y1()[i]);
      add_square(solve(), row, error / scale, y1()[i], sums);
    }
    return sums;
  }

  __device__ void decide(int s, const TilePartial& error) const {
    FlowAttempt& a = lanes_.attempt[s];
    if (a.done != 0 || a.failure != 0) {
      a.accepted_now = 0;
      return;
    }
    const FlowAttempt taken = a;
    decide_step(plan(s), norm(error), error.nonfinite == 0);
    if (a.accepted_now != 0 && p_.times != nullptr) remember(s, taken);
    count(s);
  }

  // Rows of the tape are taken as samples come; each tells the one before it.
  __device__ void remember(int s, const FlowAttempt& taken) const {
    const int64_t row = int64_t(atomicAdd(&p_.counts->rows, 1ull));
    const int64_t before = lanes_.row[s];
    lanes_.row[s] = row;
    if (row >= p_.capacity) return;
    p_.previous[row] = before;
    double* const step = p_.times + 4 * row;
    step[0] = taken.t;
    step[1] = taken.h;
    step[2] = taken.t_next;
    step[3] = taken.last;
  }

  // Moves the samples whose attempt was accepted to its end.
  __device__ void accept(const Tile<T>& tile) const {
    const int samples = tile.samples(), features = tile.features();
    T* const y = y0();
    const T* const next = y1();
    const auto slopes = k();
    T* const first = slopes.row(0);
    const T* const last = slopes.row(tableau_.stages - 1);
    for_each_place(rows_, samples, [&](int row, int s) {
      if (lanes_.attempt[s].accepted_now == 0) return;
      const int i = row * samples + s;
      const int64_t of_tape = lanes_.row[s];
      if (p_.states != nullptr && row < features && of_tape < p_.capacity) {
        p_.states[of_tape * features + row] = y[i];
      }
      y[i] = next[i];
      if (tableau_.solution_is_last_stage) first[i] = last[i];
    });
    barrier();
  }

  __device__ void store(const Tile<T>& tile) const {
    const int features = tile.features(), samples = tile.samples();
    const T* const y = y0();
    for_each_place(rows_, samples, [&](int row, int s) {
      if (!tile.counts(s)) return;
      if (row < features) {
        p_.z[tile.sample(s) * features + row] = y[row * samples + s];
      } else {
        p_.extras[(row - features) * p_.tile.batch + tile.sample(s)] = y[row * samples + s];
      }
    });
    for_each_lane(tile, [&](int s) {
      const FlowAttempt& a = lanes_.attempt[s];
      using Count = unsigned long long;
      Count evaluations = 1 + Count(adaptive_first_step()) +
                          Count(a.accepted + a.rejected) * Count(tableau_.stages - 1);
      if (!tableau_.solution_is_last_stage && a.accepted > 1) evaluations += Count(a.accepted - 1);
      atomicMax(&p_.counts->accepted, Count(a.accepted));
      atomicMax(&p_.counts->rejected, Count(a.rejected));
      atomicMax(&p_.counts->evaluations, evaluations);
      if (a.failure != 0) atomicMax(&p_.counts->failures, 1ull);
      if (p_.newest != nullptr) p_.newest[tile.sample(s)] = lanes_.row[s];
    });
  }

  // The last block tells the host.
  __device__ void finish() const {
    if (threadIdx.x > 0) return;
    __threadfence();
    SampleCounts& counts = *p_.counts;
    if (atomicAdd(&counts.blocks, 1ull) + 1 < gridDim.x) return;
    __threadfence();
    volatile double* const report = p_.report;
    report[0] = double(atomicAdd(&counts.rejected, 0ull));
    report[2] = double(atomicAdd(&counts.failures, 0ull));
    report[3] = double(atomicAdd(&counts.accepted, 0ull));
    report[4] = double(atomicAdd(&counts.evaluations, 0ull));
    report[5] = double(atomicAdd(&counts.rows, 0ull));
    publish();
    report[1] = 1;
  }

  const MlpSamplesParams<T>& p_;
  const Tableau& tableau_;
  const TileLayout& layout_;
  Lanes<T>& lanes_;
  T* numbers_;
  int rows_;
  int in_norm_;  // how many of them
};

template <typename T, Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads, 1)
    mlp_samples_kernel(const __grid_constant__ MlpSamplesParams<T> p) {
  SampleSolver<T, kPrecision>(p).run();
}

}  // namespace

template <typename T, Precision kPrecision>
cudaError_t plan_samples_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return plan_tiles<T>(
      mlp_samples_kernel<T, kPrecision>, batch, kControlNumbers<Lanes<T>, T>,
      [&](int samples, int) { return tile_layout(solve, samples, false, false); }, plan);
}

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_samples_in(const MlpSamplesParams<T>& p, const TilePlan& plan,
                                  cudaStream_t stream) {
  return launch(mlp_samples_kernel<T, kPrecision>, plan.blocks, plan.threads, plan.shared_bytes,
                stream, p);
}

}  // namespace pycnf
