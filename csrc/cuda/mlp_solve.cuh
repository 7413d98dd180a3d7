// The fused engine's solve with steps shared by the batch, in one launch: all blocks run at the same
// time, each takes the attempted step with its tiles of samples, and after every attempt they meet
// once, to add up the norm of the error. What follows from the norm each works out for itself.

#pragma once

#include "cuda/mlp_kernel.cuh"
#include "cuda/mlp_plan.cuh"

namespace pycnf {
namespace {

__device__ inline void add(TilePartial& sum, const TilePartial& x) {
  sum.z += x.z;
  sum.logdet += x.logdet;
  sum.state += x.state;
  sum.nonfinite += x.nonfinite;
}

// What stands at the beginning of a block's shared memory, before the numbers of TileLayout.
template <typename T>
struct Control {
  FlowAttempt attempt;
  TilePartial total;
  TilePartial of_warp[kTileThreads / kWarp];
  T times[kMaxStages];
  T h[1];
  Weights<T> weights;
};

// The sum over a block, for all of its threads. A fixed tree, so the same every time.
template <typename T>
__device__ TilePartial block_sum(TilePartial x, Control<T>& control) {
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    add(x, {shuffle_down(x.z, offset), shuffle_down(x.logdet, offset),
            shuffle_down(x.state, offset), shuffle_down(x.nonfinite, offset)});
  }
  if (threadIdx.x % kWarp == 0) control.of_warp[threadIdx.x / kWarp] = x;
  barrier();
  if (threadIdx.x == 0) {
    control.total = control.of_warp[0];
    for (int warp = 1; warp < int(blockDim.x) / kWarp; ++warp) {
      add(control.total, control.of_warp[warp]);
    }
  }
  barrier();
  return control.total;
}

// A block's part in a solve.
template <typename T, Precision kPrecision>
class Solver {
 public:
  __device__ explicit Solver(const MlpSolveParams<T>& p)
      : p_(p),
        tableau_(p.tile.tableau),
        layout_(p.tile.layout),
        control_(*shared_memory<Control<T>>()),
        numbers_(shared_memory<T>() + kControlNumbers<Control<T>, T>),
        rows_(int(state_rows(p.tile.solve))),
        in_norm_(rows_in_norm(p.tile.solve)) {
    load_method(tableau_, control_.weights);
    load_weights(solve(), layout_, numbers_);
    for_each_tile([&](const Tile<T>& tile) {
      for_each_place(1, tile.samples(), [&](int, int s) { make_key(tile, s); });
      T* const y = state(0, tile.index);
      for_each_place(rows_, layout_.samples, [&](int row, int s) {
        const int features = tile.features();
        y[row * layout_.samples + s] =
            row < features ? p_.x[tile.sample(s) * features + row] : T(0);
      });
    });
    barrier();
  }

  __device__ void adaptive() {
    begin();
    bool has_first = true;
    while (running()) {
      const bool has = has_first || tableau_.solution_is_last_stage;
      attempt(has ? 1 : 0);
      const TilePartial error = meet([&](const Tile<T>& tile) { return finish(tile); });
      if (threadIdx.x == 0) {
        decide_step(plan(), norm(error.z, error.logdet), error.nonfinite == 0);
      }
      barrier();
      has_first = control_.attempt.accepted_now == 0;
      if (!has_first) accept(int64_t(control_.attempt.accepted) - 1);
    }
    tell();
  }

  __device__ void fixed() {
    double failed = 0;
    for (int64_t n = 0; n + 1 < p_.grid_times; ++n) {
      barrier();  // the last step's sizes have been read
      if (threadIdx.x == 0) take_from_grid(n);
      barrier();
      attempt(n == 0 || !tableau_.solution_is_last_stage ? 0 : 1);
      for_each_tile([&](const Tile<T>& tile) { failed += finish(tile).nonfinite; });
      accept(n);
    }
    // A tile's numbers were counted by many threads.
    const TilePartial total = meet([&](const Tile<T>& tile) {
      const bool first = tile.index == blockIdx.x;
      return TilePartial{0, 0, 0, first ? failed : 0};
    });
    if (threadIdx.x > 0) return;
    FlowAttempt& a = control_.attempt;
    a.accepted = double(p_.grid_times - 1);
    a.failure = double(total.nonfinite == 0 ? FlowFailure::kNone : FlowFailure::kOther);
    a.size = fabs(p_.grid[p_.grid_times - 1] - p_.grid[p_.grid_times - 2]);
    a.done = 1;
    tell();
  }

  __device__ void store() {
    const int features = int(solve().field.features);
    for_each_tile([&](const Tile<T>& tile) {
      const T* const y = state(current_, tile.index);
      for_each_place(rows_, layout_.samples, [&](int row, int s) {
        if (!tile.counts(s)) return;
        const T value = y[row * layout_.samples + s];
        if (row < features) {
          p_.z[tile.sample(s) * features + row] = value;
        } else {
          p_.extras[(row - features) * p_.tile.batch + tile.sample(s)] = value;
        }
      });
    });
  }

 private:
  __device__ const MlpSolve<T>& solve() const { return p_.tile.solve; }

  // Everybody looks before anybody goes on and writes.
  __device__ bool running() const {
    const bool on = control_.attempt.done == 0 && control_.attempt.failure == 0;
    barrier();
    return on;
  }

  // One block tells those that come after, and at the end the host.
  __device__ FlowPlan<T> plan() const {
    FlowPlan<T> plan = {};
    plan.rule = p_.rule;
    plan.attempt = &control_.attempt;
    plan.times = control_.times;
    plan.h = control_.h;
    plan.capacity = p_.times != nullptr ? p_.capacity : 0;
    if (blockIdx.x == 0) plan.tape = p_.times;
    return plan;
  }

  __device__ void tell() const {
    if (global_thread() > 0) return;
    FlowPlan<T> to_host = plan();
    to_host.report = p_.report;
    report(to_host);
  }

  template <typename Body>
  __device__ void for_each_tile(const Body& body) const {
    for (int64_t index = blockIdx.x; index < p_.tile.tiles; index += gridDim.x) {
      body(Tile<T>{solve(), p_.tile.noise, layout_, numbers_, p_.tile.batch, index, nullptr});
    }
  }

  __device__ T* state(int which, int64_t tile) const {
    return p_.y + (which * p_.tile.tiles + tile) * rows_ * layout_.samples;
  }

  // The first and the last stage of k change places when the last serves as the next step's first.
  __device__ StageRows<T> stages(int64_t tile) const {
    const int64_t numbers = int64_t(rows_) * layout_.samples;
    return {p_.k + tile * numbers, p_.tile.tiles * numbers, flip_ ? tableau_.stages - 1 : 0};
  }

  // Of the stage i, in control_.times.
  __device__ void set_time(int i) const {
    pycnf::set_time(solve(), layout_, numbers_, control_.times + i, 0);
  }

  // Every tile's sums, added up over all tiles of all blocks in the order of tiles.
  template <typename Body>
  __device__ TilePartial meet(const Body& partial_of) {
    TilePartial* const partials = p_.partials + phase_ * p_.tile.tiles;
    // Who is still reading those of the last meeting is not disturbed.
    phase_ = 1 - phase_;
    for_each_tile([&](const Tile<T>& tile) {
      const TilePartial sum = block_sum(partial_of(tile), control_);
      if (threadIdx.x == 0) partials[tile.index] = sum;
    });
    grid_barrier();
    TilePartial mine = {};
    for (int64_t i = threadIdx.x; i < p_.tile.tiles; i += blockDim.x) add(mine, partials[i]);
    return block_sum(mine, control_);
  }

  __device__ double norm(double z, double logdet) const {
    return norm_of(solve(), z, logdet, double(p_.tile.batch));
  }

  // The state at the start, its derivative, and the size of the first step.
  __device__ void begin() {
    FlowAttempt& a = control_.attempt;
    if (threadIdx.x == 0) {
      a = attempt_at_start(p_.start, p_.end, p_.rule.control.first_step);
      control_.times[0] = T(p_.start);
      control_.h[0] = T(0);
    }
    barrier();
    set_time(0);
    const TilePartial start = meet([&](const Tile<T>& tile) {
      evaluate_stage(tile, 0);
      return start_norms(tile, nullptr);
    });
    if (threadIdx.x == 0) a.finite = start.nonfinite == 0 ? 1 : 0;
    const bool given = p_.rule.control.first_step != 0;
    double difference = 0;
    if (!given) {
      const double state_norm = norm(start.state, 0);
      if (threadIdx.x == 0) begin_flow(plan(), state_norm, norm(start.z, start.logdet));
      barrier();
      set_time(0);
      const TilePartial changed = meet([&](const Tile<T>& tile) {
        trial(tile);
        return start_norms(tile, stages(tile.index).row(1));
      });
      difference = changed.nonfinite == 0 ? norm(changed.z, changed.logdet) : double(INFINITY);
    }
    if (threadIdx.x == 0) choose_first_step(plan(), given ? nullptr : &difference);
    barrier();
  }

  // Of the state and its derivative, or of the derivative's change.
  __device__ TilePartial start_norms(const Tile<T>& tile, const T* changed) const {
    TilePartial sum = {};
    const T* const y = state(current_, tile.index);
    const T* const k = stages(tile.index).row(0);
    const int samples = layout_.samples;
    for_each_place(changed != nullptr ? in_norm_ : rows_, samples, [&](int row, int s) {
      if (!tile.counts(s)) return;
      const int i = row * samples + s;
      const T scale = p_.atol + p_.rtol * magnitude(y[i]);
      const T value = changed != nullptr ? changed[i] - k[i] : k[i];
      add_square(solve(), row, value / scale, value, sum);
      if (changed != nullptr) return;
      const double of_state = double(y[i] / scale);
      if (row < tile.features()) sum.state += of_state * of_state;
      if (!is_finite(y[i])) sum.nonfinite += 1;
    });
    return sum;
  }

  // The derivative after a step of Euler's, in the place of the second stage.
  __device__ void trial(const Tile<T>& tile) const {
    const auto k = stages(tile.index);
    const T euler[1] = {T(1)};
    stage_state(tile, k, euler, 1);
    evaluate<kPrecision>(tile, solve().tangents > 0, k.row(1));
  }

  // The state z that a stage is evaluated at.
  __device__ void stage_state(const Tile<T>& tile, const StageRows<T>& k, const T* weights,
                              int count) const {
    const T* const y = state(current_, tile.index);
    T* const z = tile.at(layout_.z);
    const Wide<T> h = filled<T, kFull<T>>(control_.h[0]);
    for_each_group_in<T>(tile.features() * layout_.samples,
                         [&](int i) { pycnf::store(z + i, stepped(y, h, k, weights, count, i)); });
  }

  __device__ void evaluate_stage(const Tile<T>& tile, int i) const {
    const auto k = stages(tile.index);
    stage_state(tile, k, control_.weights.a[i], i);
    evaluate<kPrecision>(tile, needs_divergence(solve(), tableau_, i), k.row(i));
  }

  // The stages from `first` on, and the solution.
  __device__ void attempt(int first) const {
    for (int i = first; i < tableau_.stages; ++i) {
      set_time(i);
      for_each_tile([&](const Tile<T>& tile) { evaluate_stage(tile, i); });
    }
    for_each_tile([&](const Tile<T>& tile) {
      const auto k = stages(tile.index);
      const T* const y = state(current_, tile.index);
      T* const next = state(1 - current_, tile.index);
      const Wide<T> h = filled<T, kFull<T>>(control_.h[0]);
      for_each_group_in<T>(rows_ * layout_.samples, [&](int i) {
        pycnf::store(next + i, stepped(y, h, k, control_.weights.b, tableau_.stages, i));
      });
    });
    barrier();
  }

  // The norm of an attempt's error, and whether it ends in finite numbers.
  __device__ TilePartial finish(const Tile<T>& tile) const {
    TilePartial sum = {};
    const auto k = stages(tile.index);
    const T* const y0 = state(current_, tile.index);
    const T* const y1 = state(1 - current_, tile.index);
    for_each_group_of(tile, rows_, [&](int row, int s) {
      const int i = row * layout_.samples + s;
      const Wide<T> before = fetch_group(y0 + i), after = fetch_group(y1 + i);
      const Wide<T> error = combined(k, control_.weights.e, tableau_.stages, i);
#pragma unroll
      for (int e = 0; e < kFull<T>; ++e) {
        if (!tile.counts(s + e)) break;
        const T scale = p_.atol + p_.rtol * larger_magnitude(before.value[e], after.value[e]);
        const T scaled = control_.h[0] * error.value[e] / scale;
        add_square(solve(), row, scaled, after.value[e], sum);
      }
    });
    return sum;
  }

  // Moves to the end of the n-th accepted step.
  __device__ void accept(int64_t n) {
    if (p_.states != nullptr) {
      for_each_tile([&](const Tile<T>& tile) {
        const T* const y = state(current_, tile.index);
        const int features = tile.features(), samples = layout_.samples;
        for_each_place(features, samples, [&](int d, int s) {
          if (!tile.counts(s)) return;
          p_.states[(n * p_.tile.batch + tile.sample(s)) * features + d] = y[d * samples + s];
        });
      });
    }
    current_ = 1 - current_;
    if (tableau_.solution_is_last_stage) flip_ = !flip_;
  }

  __device__ void take_from_grid(int64_t n) const {
    const double t = p_.grid[n], t_next = p_.grid[n + 1], h = t_next - t;
    control_.h[0] = T(h);
    for (int i = 0; i < tableau_.stages; ++i) {
      control_.times[i] = T(tableau_.c[i] == 1 ? t_next : t + tableau_.c[i] * h);
    }
    if (blockIdx.x > 0 || p_.times == nullptr) return;
    double* const step = p_.times + 3 * n;
    step[0] = t;
    step[1] = h;
    step[2] = t_next;
  }

  const MlpSolveParams<T>& p_;
  const Tableau& tableau_;
  const TileLayout& layout_;
  Control<T>& control_;
  T* numbers_;
  int rows_;
  int in_norm_;  // how many of them
  int current_ = 0;
  int phase_ = 0;
  bool flip_ = false;
};

template <typename T, Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads, 1)
    mlp_solve_kernel(const __grid_constant__ MlpSolveParams<T> p) {
  Solver<T, kPrecision> solver(p);
  if (p.grid != nullptr) {
    solver.fixed();
  } else {
    solver.adaptive();
  }
  solver.store();
}

}  // namespace

template <typename T, Precision kPrecision>
cudaError_t plan_solve_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return plan_tiles<T>(
      mlp_solve_kernel<T, kPrecision>, batch, kControlNumbers<Control<T>, T>,
      [&](int samples, int) { return tile_layout(solve, samples, false, false); }, plan);
}

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_solve_in(const MlpSolveParams<T>& p, const TilePlan& plan,
                                cudaStream_t stream) {
  return launch_together(mlp_solve_kernel<T, kPrecision>, plan.blocks, plan.threads,
                         plan.shared_bytes, stream, p);
}

}  // namespace pycnf
