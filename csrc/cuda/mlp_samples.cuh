// The fused engine's solve with steps of the samples' own, in one launch. A lane of a block's tile
// takes a sample from start to end, then one that nobody has begun. Neither blocks nor lanes wait for
// each other, but for this: where a sample begins, which takes two evaluations, all lanes of the tile
// take part in them, so some of those that have ended are waited for.

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
  alignas(16) T h[kMostSamples];
  int64_t row[kMostSamples];     // of a sample's newest step on the tape, -1 for none
  int64_t sample[kMostSamples];  // -1 for none
  int fresh[kMostSamples];       // whether the sample has yet to begin
  int begun;                     // lanes whose sample is fresh
  int running;                   // lanes whose sample has not ended
  int ended;                     // lanes whose sample has ended, and still has them
  int left;                      // whether there may be samples that nobody has begun
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
    for_each_place(1, layout_.samples, [&](int, int s) {
      lanes_.sample[s] = -1;
      lanes_.attempt[s] = attempt_at_start(p_.start, p_.end, 0);
      lanes_.attempt[s].done = 1;
      // Lanes that never have a sample compute too.
      lanes_.h[s] = T(0);
      for (int i = 0; i < tableau_.stages; ++i) lanes_.times[s][i] = T(p_.start);
    });
    for_each_place(kSlabs + tableau_.stages, rows_ * layout_.samples,
                   [&](int which, int i) { scratch(which)[i] = T(0); });
    if (threadIdx.x == 0) lanes_.left = 1;
    barrier();
  }

  __device__ void run() {
    const Tile<T> tile = {solve(), p_.tile.noise, layout_, numbers_, p_.tile.batch,
                          0,       lanes_.sample};
    while (take_samples(tile)) {
      while (go_on(tile)) {
        attempt(tile);
        norms_of_lanes(
            tile, rows_,
            [&](int row, int s, int i, TilePartial& sums) {
              const T scale = p_.atol + p_.rtol * larger_magnitude(y0()[i], y1()[i]);
              add_square(solve(), row, lanes_.h[s] * error()[i] / scale, y1()[i], sums);
            },
            [&](int s, const TilePartial& error) { decide(s, error); });
        accept(tile);
      }
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

  __device__ bool has_ended(int s) const {
    return lanes_.attempt[s].done != 0 || lanes_.attempt[s].failure != 0;
  }

  // Adds up terms of a lane's rows, body(row, s, its number, sums), for done(s, sums); ends with a
  // barrier. Neighbouring threads share a lane.
  template <typename Body, typename Done>
  __device__ void norms_of_lanes(const Tile<T>& tile, int rows, const Body& body,
                                 const Done& done) const {
    const int samples = tile.samples(), part = int(threadIdx.x) % kSharers;
    for (int begin = 0; begin < samples; begin += int(blockDim.x) / kSharers) {
      const int s = begin + int(threadIdx.x) / kSharers;
      TilePartial sums = {};
      for (int row = part; s < samples && row < rows; row += kSharers) {
        body(row, s, row * samples + s, sums);
      }
      sums = {shared_sum<kSharers>(sums.z), shared_sum<kSharers>(sums.logdet),
              shared_sum<kSharers>(sums.state), shared_sum<kSharers>(sums.nonfinite)};
      if (part == 0 && s < samples && tile.counts(s)) done(s, sums);
    }
    barrier();
  }

  __device__ T* scratch(int which) const {
    const int64_t numbers = int64_t(rows_) * layout_.samples;
    return p_.scratch + (blockIdx.x * int64_t(kSlabs + tableau_.stages) + which) * numbers;
  }

  __device__ T* y0() const { return scratch(0); }
  __device__ T* y1() const { return scratch(1); }
  __device__ T* error() const { return scratch(2); }  // of an attempt, without h
  __device__ StageRows<T> k() const {
    return {scratch(kSlabs), int64_t(rows_) * layout_.samples, 0};
  }

  __device__ void set_time(int i) const {
    pycnf::set_time(solve(), layout_, numbers_, lanes_.times[0] + i, kMaxStages);
  }

  // ---- samples begin ------------------------------------------------------------------------------

  // Hands lanes whose sample has ended to samples that nobody has begun, and begins with these; false
  // where there is nothing left to do. Ends with a barrier.
  __device__ bool take_samples(const Tile<T>& tile) const {
    store(tile);
    const bool left = lanes_.left != 0;
    barrier();
    if (threadIdx.x == 0) lanes_.begun = 0;
    barrier();
    for_each_place(1, tile.samples(), [&](int, int s) {
      lanes_.fresh[s] = 0;
      if (!has_ended(s)) return;
      const int64_t next = left ? int64_t(atomicAdd(&p_.counts->samples, 1ull)) : p_.tile.batch;
      lanes_.sample[s] = next < p_.tile.batch ? next : -1;
      if (next >= p_.tile.batch) {
        lanes_.left = 0;
        return;
      }
      lanes_.fresh[s] = 1;
      atomicAdd(&lanes_.begun, 1);
      lanes_.attempt[s] = attempt_at_start(p_.start, p_.end, p_.rule.control.first_step);
      for (int i = 0; i < tableau_.stages; ++i) lanes_.times[s][i] = T(p_.start);
      lanes_.h[s] = T(0);
      lanes_.row[s] = -1;
      make_key(tile, s);
    });
    if (threadIdx.x == 0) drop_probe(tile);
    barrier();
    if (lanes_.begun > 0) begin(tile);
    const int running = count(tile);
    return running + lanes_.ended > 0;
  }

  // The fresh samples' state at the start, its derivative, and the size of their first step. What the
  // others have in y0 and in the first stage stays.
  __device__ void begin(const Tile<T>& tile) const {
    const int features = tile.features(), samples = tile.samples();
    for_each_place(rows_, samples, [&](int row, int s) {
      if (lanes_.fresh[s] == 0) return;
      y0()[row * samples + s] = row < features ? p_.x[tile.sample(s) * features + row] : T(0);
    });
    barrier();
    set_time(0);
    evaluate_stage(tile, 0, y1());
    for_each_place(rows_, samples, [&](int row, int s) {
      const int i = row * samples + s;
      if (lanes_.fresh[s] != 0) k().row(0)[i] = y1()[i];
    });
    barrier();
    const auto square = [&](const T* of, int row, int i, TilePartial& sums) {
      const T scale = p_.atol + p_.rtol * magnitude(y0()[i]);
      add_square(solve(), row, of[i] / scale, of[i], sums);
    };
    norms_of_lanes(
        tile, rows_,
        [&](int row, int, int i, TilePartial& sums) {
          TilePartial state = {};
          square(y0(), row, i, state);
          sums.state += state.z;  // ℓ is zero
          sums.nonfinite += state.nonfinite;
          square(k().row(0), row, i, sums);
        },
        [&](int s, const TilePartial& sums) {
          if (lanes_.fresh[s] == 0) return;
          lanes_.attempt[s].finite = sums.nonfinite == 0 ? 1 : 0;
          if (adaptive_first_step()) begin_flow(plan(s), norm(sums.state, 0), norm(sums));
        });
    if (adaptive_first_step()) {
      set_time(0);
      const T euler[1] = {T(1)};
      stage_state(tile, euler, 1);
      evaluate<kPrecision>(tile, solve().tangents > 0, k().row(1));
    }
    norms_of_lanes(
        tile, adaptive_first_step() ? in_norm_ : 0,
        [&](int row, int, int i, TilePartial& sums) {
          const T change = k().row(1)[i] - k().row(0)[i];
          add_square(solve(), row, change / (p_.atol + p_.rtol * magnitude(y0()[i])), change, sums);
        },
        [&](int s, const TilePartial& changed) {
          if (lanes_.fresh[s] == 0) return;
          const double difference = changed.nonfinite == 0 ? norm(changed) : double(INFINITY);
          choose_first_step(plan(s), adaptive_first_step() ? &difference : nullptr);
        });
  }

  // How many lanes' samples have not ended. Begins and ends with a barrier.
  __device__ int count(const Tile<T>& tile) const {
    barrier();
    if (threadIdx.x == 0) lanes_.running = lanes_.ended = 0;
    barrier();
    for_each_place(1, tile.samples(), [&](int, int s) {
      if (tile.counts(s)) atomicAdd(has_ended(s) ? &lanes_.ended : &lanes_.running, 1);
    });
    barrier();
    return lanes_.running;
  }

  // Until a quarter of the lanes waits for samples that there may be.
  __device__ bool go_on(const Tile<T>& tile) const {
    if (count(tile) == 0) return false;
    return lanes_.left == 0 || 4 * lanes_.ended < tile.samples();
  }

  // ---- steps --------------------------------------------------------------------------------------

  // The state z that a stage is evaluated at.
  __device__ void stage_state(const Tile<T>& tile, const T* weights, int count) const {
    const int samples = tile.samples();
    const T* const y = y0();
    T* const z = tile.at(layout_.z);
    const auto slopes = k();
    for_each_group_of(tile, tile.features(), [&](int d, int s) {
      const int i = d * samples + s;
      pycnf::store(z + i, stepped(y, fetch_group(lanes_.h + s), slopes, weights, count, i));
    });
  }

  __device__ void evaluate_stage(const Tile<T>& tile, int i, T* rates) const {
    stage_state(tile, lanes_.weights.a[i], i);
    evaluate<kPrecision>(tile, needs_divergence(solve(), tableau_, i), rates);
  }

  // All stages but a first one that there is, and the solution.
  __device__ void attempt(const Tile<T>& tile) const {
    for (int i = tableau_.solution_is_last_stage ? 1 : 0; i < tableau_.stages; ++i) {
      set_time(i);
      evaluate_stage(tile, i, k().row(i));
    }
    const int samples = tile.samples();
    const auto slopes = k();
    const auto& weights = lanes_.weights;
    for_each_group_of(tile, rows_, [&](int row, int s) {
      const int i = row * samples + s, stages = tableau_.stages;
      pycnf::store(y1() + i,
                   stepped(y0(), fetch_group(lanes_.h + s), slopes, weights.b, stages, i));
      pycnf::store(error() + i, combined(slopes, weights.e, stages, i));
    });
    barrier();
  }

  // Of one sample.
  __device__ double norm(double z, double logdet) const { return norm_of(solve(), z, logdet, 1); }
  __device__ double norm(const TilePartial& sums) const { return norm(sums.z, sums.logdet); }

  __device__ void decide(int s, const TilePartial& error) const {
    FlowAttempt& a = lanes_.attempt[s];
    const FlowAttempt taken = a;
    decide_step(plan(s), norm(error), error.nonfinite == 0);
    if (a.accepted_now != 0 && p_.times != nullptr) remember(s, taken);
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
      if (!tile.counts(s) || lanes_.attempt[s].accepted_now == 0) return;
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

  // Of the samples that have ended.
  __device__ void store(const Tile<T>& tile) const {
    const int features = tile.features(), samples = tile.samples();
    const T* const y = y0();
    for_each_place(rows_, samples, [&](int row, int s) {
      if (!tile.counts(s) || !has_ended(s)) return;
      if (row < features) {
        p_.z[tile.sample(s) * features + row] = y[row * samples + s];
      } else {
        p_.extras[(row - features) * p_.tile.batch + tile.sample(s)] = y[row * samples + s];
      }
    });
    for_each_place(1, samples, [&](int, int s) {
      if (!tile.counts(s) || !has_ended(s)) return;
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
