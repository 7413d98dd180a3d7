// The exact gradient of a solve's accepted steps, in one launch: a block takes a tile of samples back
// through all steps, then the next tile; with steps of the samples' own, a lane takes a sample back,
// then its next. Which samples a lane has is a matter of the grid alone, so that sums are the same
// every time. Stages are computed again from the states of the tape. The gradients of parameters add
// up in the block's own memory; at the end all blocks meet, and each adds up a part of them all.
#pragma once

#include "cuda/mlp_kernel.cuh"
#include "cuda/mlp_plan.cuh"

namespace pycnf {
namespace {

#include "cuda/mlp_reverse.cuh"

// What stands at the beginning of a block's shared memory, before the numbers of TileLayout: the
// step that is gone back, or one for each sample.
template <typename T>
struct TakenStep {
  Weights<T> weights;
  alignas(16) T h[kMostSamples];
  T times[kMostSamples][kMaxStages];
  int64_t place[kMostSamples];  // on the tape, -1 for no step
  // With own steps.
  int64_t sample[kMostSamples];  // -1 for none
  int turned[kMostSamples];      // whether the lane goes on to its next sample
  int turns;                     // lanes that do
  int left;                      // lanes that have a sample
};

// A block's part in a gradient.
template <typename T, Precision kPrecision>
class Gradient {
 public:
  __device__ explicit Gradient(const MlpGradientParams<T>& p)
      : p_(p),
        tableau_(p.tile.tableau),
        layout_(p.tile.layout),
        step_(*shared_memory<TakenStep<T>>()),
        numbers_(shared_memory<T>() + kControlNumbers<TakenStep<T>, T>),
        rows_(int(state_rows(p.tile.solve))),
        used_(stages_in_use(p.tile.tableau)),
        sums_{p.places, of_block(), numbers_ + layout_.mixed_bar} {
    load_method(tableau_, step_.weights);
    load_weights(solve(), layout_, numbers_);
    for_each_place(1, p_.places.numbers, [&](int, int i) { sums_.numbers[i] = T(0); });
    if (solve().closed_form) {
      for_each_place(1, mixed_numbers(), [&](int, int i) { sums_.mixed[i] = T(0); });
    }
    barrier();
  }

  __device__ void run() {
    if (own()) {
      go_back_by_lanes();
    } else {
      for (int64_t index = blockIdx.x; index < p_.tile.tiles; index += gridDim.x) {
        go_back(tile_of(index, nullptr));
      }
    }
    // Without a gate in the last layer M is the same at any time.
    if (solve().closed_form && !mix_depends_on_time(solve()))
      unmix(solve(), layout_, numbers_, sums_);
    barrier();
    if (layout_.gradient >= 0) {
      T* const out = p_.sums + blockIdx.x * int64_t(p_.places.numbers);
      for_each_place(1, p_.places.numbers, [&](int, int i) { out[i] = sums_.numbers[i]; });
    }
    grid_barrier();
    gather();
  }

 private:
  __device__ const MlpSolve<T>& solve() const { return p_.tile.solve; }
  __device__ bool own() const { return p_.previous != nullptr; }

  __device__ Tile<T> tile_of(int64_t index, const int64_t* lanes) const {
    return {solve(), p_.tile.noise, layout_, numbers_, p_.tile.batch, index, lanes};
  }

  __device__ T* of_block() const {
    if (layout_.gradient >= 0) return numbers_ + layout_.gradient;
    return p_.sums + blockIdx.x * int64_t(p_.places.numbers);
  }

  __device__ int mixed_numbers() const {
    const auto& field = solve().field;
    return field.layers == 2 ? int(field.layer[0].out)
                             : int(field.layer[1].in) * layout_.weight_stride[1];
  }

  // The gradients of parameters, a warp's lanes with a number each, its warps with some of the blocks.
  __device__ void gather() const {
    const auto& pieces = p_.pieces;
    const int parts = int(blockDim.x) / kWarp;
    const int lane = int(threadIdx.x) % kWarp, part = int(threadIdx.x) / kWarp;
    static_assert(sizeof(TakenStep<T>) >= kTileThreads * sizeof(T));
    T* const partial = shared_memory<T>();  // [parts, kWarp], in the place of the step
    for (int64_t first = int64_t(blockIdx.x) * kWarp; first < pieces.total;
         first += int64_t(gridDim.x) * kWarp) {
      const int64_t i = first + lane;
      int which = pieces.count - 1;
      while (which > 0 && pieces.piece[which].first > i) --which;
      const auto& piece = pieces.piece[which];
      // Neighbouring threads read neighbouring numbers.
      const int64_t row = (i - piece.first) % piece.rows, column = (i - piece.first) / piece.rows;
      const T* from = p_.sums + piece.place + row * piece.row_stride + column * piece.column_stride;
      T sum = T(0);
#pragma unroll 4
      for (int64_t block = part; i < pieces.total && block < gridDim.x; block += parts) {
        sum += from[block * p_.places.numbers];
      }
      barrier();  // the last numbers have been read
      partial[threadIdx.x] = sum;
      barrier();
      if (part > 0 || i >= pieces.total) continue;
      for (int other = 1; other < parts; ++other) sum += partial[other * kWarp + lane];
      piece.out[row * piece.columns + column] = sum;
    }
  }

  // The block's scratch: the state at the start of a step, then derivatives, then their cotangents.
  __device__ T* scratch(int which) const {
    const int64_t row = int64_t(rows_) * layout_.samples;
    return p_.k + (blockIdx.x * int64_t(1 + 2 * tableau_.stages) + which) * row;
  }

  __device__ StageRows<T> scratch_rows(int first) const {
    return {scratch(first), int64_t(rows_) * layout_.samples, 0};
  }

  // Calls body(s) for every sample of a tile, a thread each.
  template <typename Body>
  __device__ void for_each_sample(const Tile<T>& tile, const Body& body) const {
    for_each_place(1, tile.samples(), [&](int, int s) { body(s); });
  }

  // Of the samples that `wanted` says. Those that have none have no part in a gradient.
  template <typename Wanted>
  __device__ void load_cotangents(const Tile<T>& tile, const Wanted& wanted) const {
    const int features = tile.features(), samples = tile.samples();
    T* const z_bar = tile.at(layout_.z_bar);
    T* const extras_bar = tile.at(layout_.extras_bar);
    for_each_place(features, samples, [&](int d, int s) {
      if (!wanted(s)) return;
      z_bar[d * samples + s] = tile.counts(s) ? p_.z_bar[tile.sample(s) * features + d] : T(0);
    });
    for_each_place(rows_ - features, samples, [&](int row, int s) {
      if (!wanted(s)) return;
      const bool has = p_.extras_bar != nullptr && tile.counts(s);
      extras_bar[row * samples + s] =
          has ? p_.extras_bar[row * p_.tile.batch + tile.sample(s)] : T(0);
    });
  }

  template <typename Wanted>
  __device__ void store_gradients(const Tile<T>& tile, const Wanted& wanted) const {
    const T* const z_bar = tile.at(layout_.z_bar);
    for_each_place(tile.features(), tile.samples(), [&](int d, int s) {
      if (!wanted(s) || !tile.counts(s)) return;
      p_.x_bar[tile.sample(s) * tile.features() + d] = z_bar[d * tile.samples() + s];
    });
  }

  __device__ void read_step(int s, const double* taken) const {
    step_.h[s] = T(taken[1]);
    for (int i = 0; i < tableau_.stages; ++i) {
      const double c = tableau_.c[i];
      step_.times[s][i] = T(c == 1 ? taken[2] : taken[0] + c * taken[1]);
    }
  }

  // ---- steps that all samples share ---------------------------------------------------------------

  __device__ void go_back(const Tile<T>& tile) const {
    const auto all = [](int) { return true; };
    for_each_sample(tile, [&](int s) { make_key(tile, s); });
    load_cotangents(tile, all);
    for (int64_t n = p_.steps - 1; n >= 0; --n) {
      barrier();
      if (threadIdx.x == 0) {
        step_.place[0] = n;
        read_step(0, p_.times + 3 * n);
      }
      barrier();
      reverse_step(tile);
    }
    store_gradients(tile, all);
    barrier();
  }

  // ---- steps of the samples' own ------------------------------------------------------------------

  __device__ void go_back_by_lanes() const {
    const Tile<T> tile = tile_of(0, step_.sample);
    for_each_sample(tile, [&](int s) { step_.place[s] = step_.sample[s] = -1; });
    bool first = true;
    while (recall(tile, first)) {
      reverse_step(tile);
      first = false;
    }
  }

  // A lane's samples are so far apart.
  __device__ int64_t lanes() const { return int64_t(gridDim.x) * layout_.samples; }

  // On the tape; for a lane without a step any.
  __device__ int64_t place_of(int s) const { return step_.place[s] < 0 ? 0 : step_.place[s]; }

  // Reads each lane's step before the last that was gone back, or the last of its next sample; false
  // where no lane has any. A lane without a sample takes a step of size 0, whose gradient is 0.
  // Inlined it would leave too few registers in f64.
  __device__ __noinline__ bool recall(const Tile<T>& tile, bool first) const {
    barrier();
    if (threadIdx.x == 0) step_.turns = step_.left = 0;
    barrier();
    for_each_sample(tile, [&](int s) {
      int64_t& place = step_.place[s];
      if (place >= 0) place = p_.previous[place];
      step_.turned[s] = place < 0 && (first || tile.counts(s));
      if (step_.turned[s]) atomicAdd(&step_.turns, 1);
    });
    barrier();
    if (step_.turns > 0) turn(tile, first);
    for_each_sample(tile, [&](int s) {
      if (tile.counts(s)) atomicAdd(&step_.left, 1);
      // Where the field is finite, and no further.
      read_step(s, p_.times + 4 * place_of(s));
      if (step_.place[s] < 0) step_.h[s] = T(0);
    });
    barrier();
    return step_.left != 0;
  }

  // Goes on to lanes' next samples.
  __device__ void turn(const Tile<T>& tile, bool first) const {
    const auto turned = [&](int s) { return step_.turned[s] != 0; };
    store_gradients(tile, turned);
    barrier();
    for_each_sample(tile, [&](int s) {
      if (!turned(s)) return;
      const int64_t next =
          first ? int64_t(blockIdx.x) * layout_.samples + s : tile.sample(s) + lanes();
      step_.sample[s] = next < p_.tile.batch ? next : -1;
      if (next >= p_.tile.batch) return;
      step_.place[s] = p_.newest[next];
      make_key(tile, s);
    });
    if (threadIdx.x == 0) drop_probe(tile);
    barrier();
    load_cotangents(tile, turned);
    barrier();
  }

  // ---- a step --------------------------------------------------------------------------------------

  // Of a group of samples.
  __device__ Wide<T> h(int s) const {
    return own() ? fetch_group(step_.h + s) : filled<T, kFull<T>>(step_.h[0]);
  }

  // A row of the tape: the state at the start of a sample's step.
  __device__ T tape(const Tile<T>& tile, int d, int s) const {
    const int64_t row = own() ? place_of(s) : step_.place[0] * p_.tile.batch + tile.sample(s);
    return p_.states[row * tile.features() + d];
  }

  __device__ void set_time(int i) const {
    pycnf::set_time(solve(), layout_, numbers_, step_.times[0] + i, kMaxStages);
  }

  // The state that a stage was evaluated at.
  __device__ void stage_state(const Tile<T>& tile, const StageRows<T>& k, int i) const {
    const T* const start = scratch(0);
    T* const z = tile.at(layout_.z);
    for_each_group_of(tile, tile.features(), [&](int d, int s) {
      const int place = d * tile.samples() + s;
      pycnf::store(z + place, stepped(start, h(s), k, step_.weights.a[i], i, place));
    });
  }

  __device__ static Wide<T> scaled(Wide<T> bar, const Wide<T>& size, T weight) {
#pragma unroll
    for (int e = 0; e < kFull<T>; ++e) bar.value[e] *= weight * size.value[e];
    return bar;
  }

  __device__ void reverse_step(const Tile<T>& tile) const {
    const int features = tile.features(), samples = tile.samples();
    const auto k = scratch_rows(1), k_bar = scratch_rows(1 + tableau_.stages);
    T* const start = scratch(0);
    T* const z_bar = tile.at(layout_.z_bar);
    for_each_place(features, samples,
                   [&](int d, int s) { start[d * samples + s] = tape(tile, d, s); });
    for_each_group_of(tile, features, [&](int d, int s) {
      const int i = d * samples + s;
      const Wide<T> bar = fetch_group(z_bar + i), size = h(s);
      for (int j = 0; j < used_; ++j) {
        pycnf::store(k_bar.row(j) + i, scaled(bar, size, step_.weights.b[j]));
      }
    });
    barrier();
    for (int i = 0; i + 1 < used_; ++i) {
      set_time(i);
      stage_state(tile, k, i);
      evaluate<kPrecision>(tile, false, k.row(i));
    }
    for (int i = used_ - 1; i >= 0; --i) {
      set_time(i);
      stage_state(tile, k, i);
      const auto stage_bar = reverse_stage(tile, k_bar.row(i), i);
      for_each_group_of(tile, features, [&](int d, int s) {
        const int place = d * samples + s;
        const Wide<T> bar = fetch_group(stage_bar.row(d) + s), size = h(s);
        add_group(z_bar + place, bar);
        for (int j = 0; j < i; ++j) {
          const T weight = step_.weights.a[i][j];
          if (weight != T(0)) add_group(k_bar.row(j) + place, scaled(bar, size, weight));
        }
      });
      barrier();
    }
  }

  // From the cotangent of a stage's derivative to that of its state.
  __device__ Columns<T> reverse_stage(const Tile<T>& tile, const T* rate_bar, int i) const {
    const int samples = tile.samples();
    const bool with_divergence = solve().tangents > 0 && tableau_.b[i] != 0;
    const int tangents = with_divergence ? int(solve().tangents) : 0;
    const bool several = solve().tangents > 1;
    const RatesBar<T> bar = {rate_bar,
                             tile.at(layout_.extras_bar),
                             with_divergence ? step_.weights.b[i] : T(0),
                             step_.h,
                             samples,
                             own()};
    for (int l = 0; l < solve().field.layers; ++l) {
      for_each_place(1, tile.out(l) * layout_.timed, [&](int, int o) {
        tile.at(layout_.shift_sum[l])[o] = tile.at(layout_.product_sum[l])[o] = T(0);
      });
      if (layout_.curved[l] < 0) continue;
      for_each_place(1, tile.out(l) * samples,
                     [&](int, int place) { tile.at(layout_.curved[l])[place] = T(0); });
    }
    go_through(tile, {true, tangents > 0 && !several}, 0);
    for (int k = tangents - 1; several && k >= 0; --k) {
      go_through(tile, {false, true}, k);
      if (k > 0) reverse_pass<kPrecision, T>(tile, {false, true}, k, bar, nullptr, sums_);
    }
    const auto stage_bar =
        reverse_pass<kPrecision>(tile, {true, tangents > 0}, 0, bar, p_.context_bar, sums_);
    add_time_gradients(tile, sums_);
    if (solve().closed_form && with_divergence && mix_depends_on_time(solve())) {
      unmix(solve(), layout_, numbers_, sums_);
    }
    return stage_bar;
  }

  // Leaves the products of all layers.
  __device__ void go_through(const Tile<T>& tile, const Pass& pass, int k) const {
    const auto x = tile.columns(layout_.x[0]);
    barrier();
    load_inputs(tile, pass, k, x);
    barrier();
    through_layers<kPrecision>(
        tile, pass, [&](int l) { return tile.columns(layout_.product[l]); },
        [&](int) { return x; });
  }

  const MlpGradientParams<T>& p_;
  const Tableau& tableau_;
  const TileLayout& layout_;
  TakenStep<T>& step_;
  T* numbers_;
  int rows_;
  int used_;  // stages whose state enters the solution
  GradientSums<T> sums_;
};

template <typename T, Precision kPrecision>
__global__ void __launch_bounds__(kTileThreads, 1)
    mlp_gradient_kernel(const __grid_constant__ MlpGradientParams<T> p) {
  Gradient<T, kPrecision>(p).run();
}

}  // namespace

template <typename T, Precision kPrecision>
cudaError_t plan_gradient_in(const MlpSolve<T>& solve, int64_t batch, TilePlan* plan) {
  return plan_tiles<T>(
      mlp_gradient_kernel<T, kPrecision>, batch, kControlNumbers<TakenStep<T>, T>,
      [&](int samples, int64_t most) {
        const auto layout = tile_layout(solve, samples, true, true);
        return layout.numbers <= most ? layout : tile_layout(solve, samples, true, false);
      },
      plan);
}

template <typename T, Precision kPrecision>
cudaError_t launch_mlp_gradient_in(const MlpGradientParams<T>& p, const TilePlan& plan,
                                   cudaStream_t stream) {
  return launch_together(mlp_gradient_kernel<T, kPrecision>, plan.blocks, plan.threads,
                         plan.shared_bytes, stream, p);
}

}  // namespace pycnf
