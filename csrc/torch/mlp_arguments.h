// The arguments that all ops of the fused engine share, checked and read into core/mlp_solve.h's
// structs.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/List.h>

#include <string_view>
#include <vector>

#include "core/mlp_solve.h"

namespace pycnf {

using Parameters = c10::List<std::optional<at::Tensor>>;

// Of each layer: weight, bias, gate_weight, gate_bias, shift_weight.
constexpr int kPerLayer = 5;

// Where the divergence comes from; in the order of DIVERGENCES in pycnf/flows/fused.py.
enum class Divergence : int { kNone, kProbes, kUnitVectors, kClosedForm };

// The arguments that all ops of the fused engine share; schema.cpp says what they mean.
struct MlpArguments {
  const std::optional<at::Tensor>& probe;
  const std::optional<at::Tensor>& keys;
  at::IntArrayRef noise;
  const std::optional<at::Tensor>& context;
  const Parameters& parameters;
  std::string_view method;
  at::IntArrayRef kind;
  at::ArrayRef<double> weights;

  // Whether probes are random, and no tensor holds them.
  bool drawn() const { return keys.has_value(); }
  uint64_t seed() const { return uint64_t(noise[0]); }
  int64_t probes() const { return noise[1]; }
  bool gaussian() const { return noise[2] != 0; }
};

// That all tensors are where the state is.
inline void check_devices(const MlpArguments& arguments, const at::Tensor& state,
                          const char* its_name) {
  const auto check = [&](const std::optional<at::Tensor>& x, const char* name) {
    TORCH_CHECK(!x.has_value() || x->device() == state.device(), name, " must be on ",
                state.device(), " like ", its_name, ", got ", x->device());
  };
  for (size_t i = 0; i < arguments.parameters.size(); ++i) {
    check(arguments.parameters.get(i), "parameters");
  }
  check(arguments.context, "context");
  check(arguments.probe, "probe");
  check(arguments.keys, "keys");
}

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

template <typename T>
at::ScalarType dtype_of() {
  return c10::CppTypeToScalarType<T>::value;
}

// Fills in the network. `rows` makes rows [count, out] of a parameter [out, count] or [out], where
// the kernels read them; `weights` has the tensors that the layers' weights point into.
template <typename T, typename Rows>
void read_layers(const MlpArguments& arguments, int64_t features, Mlp<T>& field,
                 std::vector<at::Tensor>& weights, const Rows& rows) {
  const Parameters& parameters = arguments.parameters;
  const int64_t activation = arguments.kind[0], fourier = arguments.kind[1];
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
    auto& layer = field.layer[l];
    const std::optional<at::Tensor> given = parameters.get(l * kPerLayer);
    TORCH_CHECK(given.has_value() && given->dim() == 2 && given->size(1) == in &&
                    given->scalar_type() == dtype_of<T>(),
                "layer ", l, ": weight must be [out, ", in, "] of ", dtype_of<T>());
    // Rows may be apart; other views are copied.
    const at::Tensor weight = given->stride(1) == 1 ? *given : given->contiguous();
    weights.push_back(weight);
    layer.in = in;
    layer.out = weight.size(0);
    layer.weight = values<T>(weight);
    layer.weight_stride = weight.stride(0);
    const auto read = [&](int64_t i, const char* name, int64_t count) -> const T* {
      const std::optional<at::Tensor> x = parameters.get(l * kPerLayer + i);
      if (!x.has_value()) return nullptr;
      TORCH_CHECK(x->dim() > 0 && x->size(0) == layer.out && x->numel() == layer.out * count &&
                      x->scalar_type() == dtype_of<T>(),
                  "layer ", l, ": ", name, " must be [", layer.out, ", ", count, "] of ",
                  dtype_of<T>());
      return rows(*x, count);
    };
    layer.bias = read(1, "bias", 1);
    layer.gate_weight = read(2, "gate_weight", field.time_features);
    layer.gate_bias = read(3, "gate_bias", 1);
    TORCH_CHECK(layer.gate_weight != nullptr || layer.gate_bias == nullptr, "layer ", l,
                ": gate_bias must come with a gate_weight");
    layer.shift_weight = read(4, "shift_weight", field.time_features);
    in = layer.out;
  }
  TORCH_CHECK(in == features, "the last layer must have ", features, " outputs, got ", in);
}

// K, of probes that are given or drawn.
template <typename T>
int64_t count_probes(const MlpArguments& arguments, int64_t batch, int64_t features) {
  const auto& [probe, keys, noise, context, parameters, method, kind, weights] = arguments;
  if (!arguments.drawn()) {
    TORCH_CHECK(probe.has_value() && probe->dim() == 3 && probe->size(0) > 0 &&
                    probe->size(1) == batch && probe->size(2) == features &&
                    probe->scalar_type() == dtype_of<T>(),
                "probe must be [K, ", batch, ", ", features, "] of ", dtype_of<T>());
    return probe->size(0);
  }
  const bool rows = keys->scalar_type() == dtype_of<T>();
  TORCH_CHECK(keys->dim() == (rows ? 2 : 1) && keys->size(0) == batch &&
                  (rows ? keys->size(1) == features : keys->scalar_type() == at::kLong),
              "keys must be int64 [", batch, "], or rows [", batch, ", ", features, "] of ",
              dtype_of<T>(), ", got ", keys->scalar_type(), " ", keys->sizes());
  TORCH_CHECK(!probe.has_value() && noise.size() == 3 && noise[1] > 0,
              "keys must come without a probe, and with a seed, the number of probes and whether "
              "they are Gaussian, got noise ",
              noise);
  return arguments.probes();
}

// Fills in what does not depend on who computes: the network, and what of it is wanted.
template <typename T, typename Rows>
void read_solve(const MlpArguments& arguments, const at::Tensor& x, MlpSolve<T>& solve,
                std::vector<at::Tensor>& weights, const Rows& rows) {
  const auto& kind = arguments.kind;
  TORCH_CHECK(x.dim() == 2 && x.size(0) > 0, "x must be [B, D] with at least one row, got ",
              x.sizes());
  TORCH_CHECK((kind.size() == 5 || kind.size() == 6) && arguments.weights.size() == 3,
              "kind must be 5 or 6 numbers and weights 3, got ", kind.size(), " and ",
              arguments.weights.size());
  const int64_t precision = kind.size() > 5 ? kind[5] : 0;
  TORCH_CHECK(precision == 0 || (precision > 0 && precision < kPrecisions && x.is_cuda() &&
                                 x.scalar_type() == at::kFloat),
              "kind: got precision ", precision, ", expected 0, or up to ", kPrecisions - 1,
              " for float32 on a GPU");
  solve.precision = Precision(precision);
  solve.tableau = &find_tableau(arguments.method);
  read_layers(arguments, x.size(1), solve.field, weights, rows);
  const auto& field = solve.field;
  solve.sign = T(arguments.weights[0]);
  solve.probe_weight = T(1);
  switch (Divergence(kind[2])) {
    case Divergence::kNone:
      break;
    case Divergence::kProbes:
      solve.tangents = count_probes<T>(arguments, x.size(0), field.features);
      solve.drawn = arguments.drawn();
      solve.probe_weight = T(1) / T(solve.tangents);
      break;
    case Divergence::kUnitVectors:
      solve.tangents = field.features;
      break;
    case Divergence::kClosedForm:
      TORCH_CHECK(field.layers == 2 || field.layers == 3,
                  "the closed form is for one or two hidden layers, got ", field.layers - 1);
      TORCH_CHECK(!solve.own_times || field.layer[field.layers - 1].gate_weight == nullptr,
                  "the closed form needs a last layer without a gate where samples have times "
                  "of their own");
      TORCH_CHECK(kind[4] == 0, "the closed form has no Jacobian norm");
      solve.closed_form = true;
      solve.tangents = 1;
      break;
    default:
      TORCH_CHECK(false, "kind: got divergence ", kind[2], ", expected 0 to 3");
  }
  solve.kinetic = kind[3] != 0;
  solve.jacobian = kind[4] != 0;
  solve.kinetic_weight = T(arguments.weights[1]);
  solve.jacobian_weight = T(arguments.weights[2]);
}

// The probes that are given, [K, B, D]; undefined where there are none.
inline at::Tensor read_probe(const MlpArguments& arguments) {
  const bool given = Divergence(arguments.kind[2]) == Divergence::kProbes && !arguments.drawn();
  return given ? arguments.probe->contiguous() : at::Tensor();
}

// [B, width of the first layer]; undefined without.
template <typename T>
at::Tensor read_context(const MlpArguments& arguments, const at::Tensor& x,
                        const MlpSolve<T>& solve) {
  const auto& given = arguments.context;
  if (!given.has_value()) return {};
  const int64_t width = solve.field.layer[0].out;
  TORCH_CHECK(given->dim() == 2 && given->size(0) == x.size(0) && given->size(1) == width &&
                  given->scalar_type() == dtype_of<T>(),
              "context must be [", x.size(0), ", ", width, "] of ", dtype_of<T>(), ", got ",
              given->sizes(), " of ", given->scalar_type());
  return given->contiguous();
}

}  // namespace pycnf
