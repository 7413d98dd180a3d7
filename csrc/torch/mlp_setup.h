// From tensors to the plain structs of core/mlp_solve.h: what solves and gradients share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "torch/cpu_kernels.h"
#include "torch/mlp_arguments.h"
#include "torch/probe_cpu.h"

namespace pycnf {

template <typename T>
constexpr int64_t kAlign = 64 / int64_t(sizeof(T));

// Numbers of a weight from which on its transpose is read faster than its columns (measured).
constexpr int64_t kWide = 1 << 17;

// What a single evaluation keeps is sized for a multiple of so many samples, whatever the tile, so
// that its shape does not depend on the machine.
constexpr int64_t kKeptSamples = 64;

// The first whole vector's place in memory that has kAlign numbers to spare.
template <typename T>
T* aligned(T* pointer) {
  return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(pointer) + 63) / 64 * 64);
}

inline double stage_time(const Tableau& tableau, int stage, double t, double h, double t_next) {
  const double c = tableau.c[stage];
  return c == 1 ? t_next : t + c * h;
}

// The network at the times of some stages.
template <typename T>
struct MlpTimes {
  std::vector<T> tau;
  std::vector<T> numbers;  // aligned by hand
  std::vector<TimedLayer<T>> timed;
  std::vector<MlpAt<T>> at;  // [stages]
};

// One solve's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class MlpSetup {
 public:
  // `solving`: with what all steps of a solve share. `tile_samples`: of the tiles that another call
  // has made.
  MlpSetup(const at::Tensor& x, const MlpArguments& arguments, bool own_times, bool solving = true,
           int64_t tile_samples = 0)
      : options(x.options().requires_grad(std::nullopt)),
        batch(x.size(0)),
        table(cpu_mlp_kernels<T>()),
        steps(own_times ? table.own : table.shared) {
    solve.own_times = own_times;
    read_solve(arguments, x, solve, weights, [&](const auto& parameter, int64_t count) {
      return rows_of_outputs(parameter, count);
    });
    probe = solving && solve.drawn ? draw_probes(arguments) : read_probe(arguments);
    // Products work on two columns at a time, and tiles of fewer than 16 samples waste weights.
    const int64_t most = batch <= table.lanes ? 1 : 2;
    solve.vectors =
        std::max<int64_t>(solve.tangents > 0 ? 1 : most, std::min<int64_t>(16 / table.lanes, 8));
    if (tile_samples > 0) {
      solve.vectors = tile_samples / table.lanes;
    } else if (!own_times) {
      solve.vectors = widest_tile(solve.vectors, solving);
    }
    samples = solve.vectors * table.lanes;
    tiles = (batch + samples - 1) / samples;
    rows = state_rows(solve);
    extras = extra_rows(solve);
    chunks = std::min<int64_t>(at::get_num_threads(), tiles);
    context = read_context(arguments, x, solve);
    if (solving && !own_times) {
      if (solve.tangents > 0 && !solve.closed_form) tile_probes(probe);
      if (context.defined()) {
        context_tiles = to_tiles(context, solve.field.layer[0].out);
        solve.context = values<T>(context_tiles);
      }
    }
    if (solve.closed_form) mix_once();
    kept_numbers = table.kept_numbers(solve);
    if (!solving) return;
    workspace_numbers = table.workspace_numbers(solve);
    workspace = at::empty({chunks, workspace_numbers + kAlign<T>}, options);
  }

  at::ScalarType dtype() const { return options.dtype().toScalarType(); }

  // Whole vectors, so that the kernels may run over the end of a row.
  int64_t padded(int64_t count) const {
    return (count + table.lanes - 1) / table.lanes * table.lanes;
  }

  at::Tensor empty_tiles(int64_t height) const {
    return at::empty({tiles, height, samples}, options);
  }

  // Rows [B, width] by tiles, [tiles, height, samples]; what is left over of the last tile is
  // filled with copies of the last sample, other rows with zeros.
  at::Tensor to_tiles(const at::Tensor& x, int64_t height) const {
    const int64_t width = x.size(1);
    auto out = empty_tiles(height);
    const T* from = values<T>(x);
    T* to = mutable_values<T>(out);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t row = 0; row < height; ++row) {
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t b = std::min(tile * samples + s, batch - 1);
          *to++ = row < width ? from[b * width + row] : T(0);
        }
      }
    }
    return out;
  }

  // The same for cotangents: the copies that fill up the last tile have no part in a gradient.
  at::Tensor cotangent_tiles(const at::Tensor& x, int64_t height) const {
    auto out = to_tiles(x, height);
    out[tiles - 1].slice(1, batch - (tiles - 1) * samples).zero_();
    return out;
  }

  // The rows [first, first + width) of tiles of `height` rows, as [B, width].
  at::Tensor from_tiles(const at::Tensor& x, int64_t height, int64_t first, int64_t width) const {
    auto out = at::empty({batch, width}, options);
    const T* from = values<T>(x);
    T* to = mutable_values<T>(out);
    for (int64_t b = 0; b < batch; ++b) {
      const T* tile = from + (b / samples * height + first) * samples + b % samples;
      for (int64_t row = 0; row < width; ++row) *to++ = tile[row * samples];
    }
    return out;
  }

  // The network at the times of stages [0, count): one for all samples, or [count, samples].
  void prepare(int count, const double* times, bool rates, bool parallel, MlpTimes<T>& out) const {
    const int64_t per = solve.own_times ? samples : 1, features = solve.field.time_features;
    const int64_t timed = table.timed_numbers(solve), mixed = padded(table.mixed_numbers(solve));
    const int64_t numbers = timed + 2 * mixed + padded(table.mixing_numbers(solve));
    out.tau.resize(2 * count * features * per + kAlign<T>);
    out.numbers.resize(count * numbers + kAlign<T>);
    out.timed.resize(count * solve.field.layers);
    out.at.resize(count);
    T* const taus = aligned(out.tau.data());
    T* const first = aligned(out.numbers.data());
    const auto one = [&](int64_t i) {
      T* tau = taus + i * features * per;
      T* rate = rates ? taus + (count + i) * features * per : nullptr;
      for (int64_t s = 0; s < per; ++s) time_features(times[i * per + s], per, tau + s, rate, s);
      T* memory = first + i * numbers;
      TimedLayer<T>* layers = out.timed.data() + i * solve.field.layers;
      table.time_layers(solve, tau, rate, memory, layers);
      out.at[i] = {layers, tau, nullptr, nullptr};
      const Tableau& tableau = *solve.tableau;
      const bool needed =
          every_stage_mixed || tableau.b[i] != 0 || tableau.e[i] != 0 || i == 0 || i == count - 1;
      if (!solve.closed_form || !needed) return;
      if (mix_is_constant) {
        out.at[i].unmixed = constant_mix;
        out.at[i].mixed = constant_mix + mixed;
        return;
      }
      T* const at_time = memory + timed;
      table.mix(solve, layers[solve.field.layers - 1].gate, at_time, at_time + mixed,
                at_time + 2 * mixed);
      out.at[i].unmixed = at_time;
      out.at[i].mixed = at_time + mixed;
    };
    if (parallel && solve.closed_form) {
      at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) one(i);
      });
    } else {
      for (int i = 0; i < count; ++i) one(i);
    }
  }

  // Has the transposes of wide layers' weights, for a gradient of many stages: across the rows of a
  // weight a product reads less than a line of the cache at a time.
  void turn_weights() {
    for (int l = 0; l < solve.field.layers; ++l) {
      auto& layer = solve.field.layer[l];
      if (layer.in * layer.out < kWide) continue;
      copies.push_back(weights[l].t().contiguous());
      layer.turned = values<T>(copies.back());
    }
  }

  // The same for a step that all samples take, all stages of it.
  void prepare_step(double t, double h, double t_next, bool rates, bool parallel,
                    MlpTimes<T>& out) const {
    double times[kMaxStages];
    const int stages = solve.tableau->stages;
    for (int i = 0; i < stages; ++i) times[i] = stage_time(*solve.tableau, i, t, h, t_next);
    prepare(stages, times, rates, parallel, out);
  }

  // Calls body(chunk) for every thread's part of the tiles.
  template <typename Body>
  void for_each_chunk(const Body& body) const {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) body(chunk);
    });
  }

  // Calls body(chunk, tile, memory) for every tile, the tiles split over threads in order.
  template <typename Body>
  void for_each_tile(const Body& body) const {
    for_each_chunk([&](int64_t chunk) {
      for (int64_t tile = first_tile(chunk); tile < first_tile(chunk + 1); ++tile) {
        body(chunk, tile, memory_of(chunk));
      }
    });
  }

  int64_t first_tile(int64_t chunk) const { return chunk * tiles / chunks; }

  T* memory_of(int64_t chunk) const {
    return aligned(mutable_values<T>(workspace) + chunk * (workspace_numbers + kAlign<T>));
  }

  MlpSolve<T> solve = {};
  at::TensorOptions options;
  int64_t batch;
  const CpuMlpTable<T>& table;
  const CpuMlpSteps<T>& steps;
  at::Tensor probe;     // [K, B, D], undefined for none
  at::Tensor context;   // [B, width of the first layer], undefined for none
  int64_t samples = 0;  // of a tile
  int64_t tiles = 0;
  int64_t rows = 0;    // of the state
  int64_t extras = 0;  // rows after z
  int64_t chunks = 0;  // of tiles, one a thread
  int64_t kept_numbers = 0;
  int64_t workspace_numbers = 0;
  // Without a gate in the last layer the closed form's M is the same at any time.
  bool mix_is_constant = false;
  // The adjoint has the divergence in all stages, also in those without a weight.
  bool every_stage_mixed = false;

 private:
  at::Tensor draw_probes(const MlpArguments& arguments) const {
    const at::Tensor& keys = *arguments.keys;
    return probe_sample_cpu(keys.scalar_type() == at::kLong ? keys : probe_keys_cpu(keys),
                            int64_t(arguments.seed()), solve.tangents, solve.field.features,
                            arguments.gaussian(), dtype());
  }

  // Vectors of a tile, from `least` to four times as many: wider tiles pass over the weights, and
  // the sums of their gradients, less often. The thread with the most tiles must not get more
  // samples by it; where tiles must be the same whatever the threads, eight of them must be left.
  int64_t widest_tile(int64_t least, bool solving) const {
    const auto fits = [&](int64_t vectors) {
      if (!solving) {
        return vectors * table.lanes <= kKeptSamples && batch >= 8 * vectors * table.lanes;
      }
      const int64_t threads = at::get_num_threads();
      const auto share = [&](int64_t of) {
        const int64_t count = (batch + of * table.lanes - 1) / (of * table.lanes);
        return (count + threads - 1) / threads * of;
      };
      return 32 * share(vectors) <= 33 * share(least);
    };
    int64_t vectors = least;
    while (vectors < 4 * least && fits(2 * vectors)) vectors *= 2;
    return vectors;
  }

  void mix_once() {
    const auto& last = solve.field.layer[solve.field.layers - 1];
    mix_is_constant = last.gate_weight == nullptr;
    if (!mix_is_constant) return;
    const int64_t mixed = padded(table.mixed_numbers(solve));
    const std::vector<T> ones(padded(last.out), T(1));
    std::vector<T> scratch(table.mixing_numbers(solve) + kAlign<T>);
    constant_memory = at::empty({2 * mixed + kAlign<T>}, options);
    constant_mix = aligned(mutable_values<T>(constant_memory));
    table.mix(solve, ones.data(), constant_mix, constant_mix + mixed, aligned(scratch.data()));
  }

  // A parameter [out, count], or [out], as padded rows [count, out].
  const T* rows_of_outputs(const at::Tensor& x, int64_t count) {
    const int64_t out = x.size(0), width = padded(out), row = x.stride(0);
    const int64_t column = x.dim() > 1 ? x.stride(1) : 1;
    T* const rows = aligned(padded_rows.emplace_back(count * width + kAlign<T>).data());
    const T* from = values<T>(x);
    for (int64_t f = 0; f < count; ++f) {
      for (int64_t o = 0; o < out; ++o) rows[f * width + o] = from[o * row + f * column];
    }
    return rows;
  }

  // τ at a time and, if wanted, τ' there; features are `stride` apart.
  void time_features(double time, int64_t stride, T* tau, T* rate, int64_t s) const {
    const T t = T(time);
    if (!solve.field.fourier) {
      tau[0] = t;
      if (rate != nullptr) rate[s] = T(1);
      return;
    }
    const int64_t half = solve.field.time_features / 2;
    for (int64_t k = 0; k < half; ++k) {
      const T order = T(k + 1) * T(M_PI);
      const T cosine = std::cos(t * order), sine = std::sin(t * order);
      tau[k * stride] = cosine;
      tau[(half + k) * stride] = sine;
      if (rate == nullptr) continue;
      rate[k * stride + s] = -order * sine;
      rate[(half + k) * stride + s] = order * cosine;
    }
  }

  void tile_probes(const at::Tensor& given) {
    const int64_t features = solve.field.features, tangents = solve.tangents;
    const bool unit = !given.defined();
    probe_tiles = at::empty({unit ? 1 : tiles, features, tangents, samples}, options);
    T* to = mutable_values<T>(probe_tiles);
    const T* from = unit ? nullptr : values<T>(given);
    for (int64_t tile = 0; tile < probe_tiles.size(0); ++tile) {
      for (int64_t d = 0; d < features; ++d) {
        for (int64_t k = 0; k < tangents; ++k) {
          for (int64_t s = 0; s < samples; ++s) {
            const int64_t b = std::min(tile * samples + s, batch - 1);
            *to++ = unit ? T(k == d) : from[(k * batch + b) * features + d];
          }
        }
      }
    }
    solve.probe = values<T>(probe_tiles);
    solve.probe_stride = unit ? 0 : features * tangents * samples;
  }

  std::vector<at::Tensor> weights, copies;
  std::vector<std::vector<T>> padded_rows;  // of other parameters
  at::Tensor constant_memory;
  T* constant_mix = nullptr;
  at::Tensor probe_tiles;
  at::Tensor context_tiles;
  at::Tensor workspace;
};

}  // namespace pycnf
