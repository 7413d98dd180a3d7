// From tensors to the plain structs of core/mlp_solve.h: what solve and gradient share.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/List.h>

#include <algorithm>
#include <cmath>
#include <string_view>
#include <vector>

#include "core/mlp_solve.h"
#include "torch/cpu_kernels.h"

namespace pycnf {

using Parameters = c10::List<std::optional<at::Tensor>>;

// Of each layer: weight, bias, gate_weight, gate_bias, shift_weight.
constexpr int kPerLayer = 5;

inline const Tableau& find_tableau(std::string_view method) {
  for (const Tableau* tableau : kTableaux) {
    if (method == tableau->name) return *tableau;
  }
  TORCH_CHECK_VALUE(false, "method: got ", method, ", expected the name of a method");
}

template <typename T>
const T* values(const at::Tensor& x) {
  return x.const_data_ptr<T>();
}

template <typename T>
T* mutable_values(const at::Tensor& x) {
  return x.mutable_data_ptr<T>();
}

// One solve's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class MlpSetup {
 public:
  MlpSetup(int64_t batch, int64_t features, at::TensorOptions options,
           const std::optional<at::Tensor>& probe, const std::optional<at::Tensor>& context,
           const Parameters& parameters, int64_t activation, int64_t fourier,
           std::string_view method, bool unit_probes, double sign)
      : options(options), table(cpu_mlp_kernels<T>()) {
    TORCH_CHECK(batch > 0, "x must have at least one row");
    solve.tableau = &find_tableau(method);
    solve.batch = batch;
    solve.sign = T(sign);
    read_layers(parameters, activation, fourier, features);
    if (unit_probes) {
      solve.tangents = features;
      solve.probe_weight = T(1);
    } else if (probe.has_value()) {
      TORCH_CHECK(probe->dim() == 3 && probe->size(0) > 0 && probe->size(1) == batch &&
                      probe->size(2) == features && probe->scalar_type() == dtype(),
                  "probe must be [K, ", batch, ", ", features, "] of ", dtype(), ", got ",
                  probe->sizes(), " of ", probe->scalar_type());
      solve.tangents = probe->size(0);
      solve.probe_weight = T(1) / T(solve.tangents);
    }
    // Products work on two columns at a time, and tiles of fewer than 16 samples waste weights.
    const int64_t most = batch <= table.lanes ? 1 : 2;
    solve.vectors =
        std::max<int64_t>(solve.tangents > 0 ? 1 : most, std::min<int64_t>(16 / table.lanes, 8));
    samples = solve.vectors * table.lanes;
    tiles = (batch + samples - 1) / samples;
    rows = state_rows(solve);
    chunks = std::min<int64_t>(at::get_num_threads(), tiles);
    if (solve.tangents > 0) tile_probes(probe);
    if (context.has_value()) {
      const int64_t width = solve.field.layer[0].out;
      TORCH_CHECK(context->dim() == 2 && context->size(0) == batch && context->size(1) == width &&
                      context->scalar_type() == dtype(),
                  "context must be [", batch, ", ", width, "] of ", dtype(), ", got ",
                  context->sizes(), " of ", context->scalar_type());
      context_tiles = to_tiles(context->contiguous(), width);
      solve.context = values<T>(context_tiles);
    }
    kept_numbers = table.kept_numbers(solve);
    workspace_numbers = table.workspace_numbers(solve);
    workspace = at::empty({chunks, workspace_numbers + kAlign}, options);
    for (int l = 0; l < solve.field.layers; ++l) {
      timed_numbers += 2 * padded(solve.field.layer[l].out);
    }
  }

  at::ScalarType dtype() const { return options.dtype().toScalarType(); }

  // Whole vectors, so that the kernels may run over the end of a row.
  int64_t padded(int64_t count) const {
    return (count + table.lanes - 1) / table.lanes * table.lanes;
  }

  at::Tensor empty_state() const { return at::empty({tiles, rows, samples}, options); }

  // Rows [B, width] by tiles, [tiles, height, samples]; what is left over of the last tile is
  // filled with copies of the last sample, other rows with zeros.
  at::Tensor to_tiles(const at::Tensor& x, int64_t height) const {
    const int64_t width = x.size(1);
    auto out = at::empty({tiles, height, samples}, options);
    const T* from = values<T>(x);
    T* to = mutable_values<T>(out);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      for (int64_t row = 0; row < height; ++row) {
        for (int64_t s = 0; s < samples; ++s) {
          const int64_t b = std::min(tile * samples + s, solve.batch - 1);
          *to++ = row < width ? from[b * width + row] : T(0);
        }
      }
    }
    return out;
  }

  // The rows [first, first + width) of tiles of `height` rows, as [B, width].
  at::Tensor from_tiles(const at::Tensor& x, int64_t height, int64_t first, int64_t width) const {
    auto out = at::empty({solve.batch, width}, options);
    const T* from = values<T>(x);
    T* to = mutable_values<T>(out);
    for (int64_t b = 0; b < solve.batch; ++b) {
      const T* tile = from + (b / samples * height + first) * samples + b % samples;
      for (int64_t row = 0; row < width; ++row) *to++ = tile[row * samples];
    }
    return out;
  }

  // τ at a time.
  void time_features(double time, T* tau) const {
    const T t = T(time);
    if (!solve.field.fourier) {
      tau[0] = t;
      return;
    }
    const int64_t half = solve.field.time_features / 2;
    for (int64_t k = 0; k < half; ++k) {
      const T angle = t * (T(k + 1) * T(M_PI));
      tau[k] = std::cos(angle);
      tau[half + k] = std::sin(angle);
    }
  }

  // Gates and shifts of the stages of a step from t to t_next.
  struct StepTimes {
    std::vector<T> tau;      // [stages, F]
    std::vector<T> numbers;  // [stages, timed_numbers], aligned by hand
    std::vector<TimedLayer<T>> timed;
  };

  void prepare(double t, double h, double t_next, StepTimes& times) const {
    const int stages = solve.tableau->stages;
    const int64_t features = solve.field.time_features;
    times.tau.resize(stages * features);
    times.numbers.resize(stages * timed_numbers + kAlign);
    times.timed.resize(stages * solve.field.layers);
    for (int i = 0; i < stages; ++i) {
      const double c = solve.tableau->c[i];
      T* tau = times.tau.data() + i * features;
      time_features(c == 1 ? t_next : t + c * h, tau);
      table.time_layers(solve.field, tau, aligned(times.numbers.data()) + i * timed_numbers,
                        times.timed.data() + i * solve.field.layers);
    }
  }

  // Calls body(tile, memory) for every tile, the tiles split over threads in order.
  template <typename Body>
  void for_each_tile(const Body& body) {
    at::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        for (int64_t tile = first_tile(chunk); tile < first_tile(chunk + 1); ++tile) {
          body(tile, memory_of(chunk));
        }
      }
    });
  }

  int64_t first_tile(int64_t chunk) const { return chunk * tiles / chunks; }

  T* memory_of(int64_t chunk) const {
    return aligned(mutable_values<T>(workspace) + chunk * (workspace_numbers + kAlign));
  }

  static T* aligned(T* pointer) {
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(pointer) + 63) / 64 * 64);
  }

  static constexpr int64_t kAlign = 64 / int64_t(sizeof(T));

  MlpSolve<T> solve = {};
  at::TensorOptions options;
  const CpuMlpTable<T>& table;
  int64_t samples = 0;  // of a tile
  int64_t tiles = 0;
  int64_t rows = 0;
  int64_t chunks = 0;  // of tiles, one a thread
  int64_t kept_numbers = 0;
  int64_t workspace_numbers = 0;
  int64_t timed_numbers = 0;

 private:
  void read_layers(const Parameters& parameters, int64_t activation, int64_t fourier,
                   int64_t features) {
    auto& field = solve.field;
    const int64_t layers = int64_t(parameters.size()) / kPerLayer;
    TORCH_CHECK(
        layers >= 1 && layers <= kMaxLayers && layers * kPerLayer == int64_t(parameters.size()),
        "parameters must be ", kPerLayer, " for each of 1 to ", kMaxLayers, " layers, got ",
        parameters.size());
    TORCH_CHECK(activation >= 0 && activation < kActivations, "activation must be one of ",
                kActivations, ", got ", activation);
    field.layers = int(layers);
    field.activation = Activation(activation);
    field.features = features;
    field.fourier = fourier > 0;
    field.time_features = fourier > 0 ? fourier : 1;
    int64_t in = features;
    for (int64_t l = 0; l < layers; ++l) {
      const auto part = [&](int64_t i) -> std::optional<at::Tensor> {
        return parameters.get(l * kPerLayer + i);
      };
      auto& layer = field.layer[l];
      const auto weight = part(0);
      TORCH_CHECK(weight.has_value() && weight->dim() == 2 && weight->size(1) == in &&
                      weight->stride(1) == 1 && weight->scalar_type() == dtype(),
                  "layer ", l, ": weight must be [out, ", in, "] of ", dtype(),
                  " with rows of contiguous numbers");
      layer.in = in;
      layer.out = weight->size(0);
      layer.weight = values<T>(*weight);
      layer.weight_stride = weight->stride(0);
      layer.bias = vector_of(part(1), "bias", l, layer.out);
      layer.gate_weight = vector_of(part(2), "gate_weight", l, layer.out * field.time_features);
      layer.gate_bias = vector_of(part(3), "gate_bias", l, layer.out);
      TORCH_CHECK((layer.gate_weight == nullptr) == (layer.gate_bias == nullptr), "layer ", l,
                  ": gate_weight and gate_bias must come together");
      const auto shift = part(4);
      if (shift.has_value()) {
        TORCH_CHECK(shift->scalar_type() == dtype() &&
                        shift->numel() == layer.out * field.time_features &&
                        shift->size(0) == layer.out && (shift->dim() == 1 || shift->stride(1) == 1),
                    "layer ", l, ": shift_weight must be [", layer.out, ", ", field.time_features,
                    "] of ", dtype());
        layer.shift_weight = values<T>(*shift);
        layer.shift_stride = shift->stride(0);
      }
      in = layer.out;
    }
    TORCH_CHECK(in == features, "the last layer must have ", features, " outputs, got ", in);
  }

  const T* vector_of(const std::optional<at::Tensor>& x, const char* name, int64_t layer,
                     int64_t size) const {
    if (!x.has_value()) return nullptr;
    TORCH_CHECK(x->numel() == size && x->is_contiguous() && x->scalar_type() == dtype(), "layer ",
                layer, ": ", name, " must be ", size, " contiguous numbers of ", dtype());
    return values<T>(*x);
  }

  void tile_probes(const std::optional<at::Tensor>& probe) {
    const int64_t features = solve.field.features, tangents = solve.tangents;
    const bool unit = !probe.has_value();
    probe_tiles = at::empty({unit ? 1 : tiles, features, tangents, samples}, options);
    T* to = mutable_values<T>(probe_tiles);
    const auto given = unit ? at::Tensor() : probe->contiguous();
    const T* from = unit ? nullptr : values<T>(given);
    for (int64_t tile = 0; tile < probe_tiles.size(0); ++tile) {
      for (int64_t d = 0; d < features; ++d) {
        for (int64_t k = 0; k < tangents; ++k) {
          for (int64_t s = 0; s < samples; ++s) {
            const int64_t b = std::min(tile * samples + s, solve.batch - 1);
            *to++ = unit ? T(k == d) : from[(k * solve.batch + b) * features + d];
          }
        }
      }
    }
    solve.probe = values<T>(probe_tiles);
    solve.probe_stride = unit ? 0 : features * tangents * samples;
  }

  at::Tensor probe_tiles;
  at::Tensor context_tiles;
  at::Tensor workspace;
};

}  // namespace pycnf
