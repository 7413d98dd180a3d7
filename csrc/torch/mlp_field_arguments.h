// The arguments of the ops that evaluate the field once, and their checks, on any device.
#pragma once

#include <array>
#include <tuple>
#include <vector>

#include "torch/mlp_arguments.h"

namespace pycnf {

// The arguments that all ops share; `probe` are the tangents where `jvp`.
struct FieldArguments {
  const at::Tensor& t;
  const at::Tensor& z;
  std::optional<at::Tensor> probe;
  const std::optional<at::Tensor>& context;
  const Parameters& parameters;
  at::IntArrayRef kind;
  bool jvp = false;
  std::optional<at::Tensor> keys = {};
  int64_t seed = 0;
  int64_t probes = 0;
  bool gaussian = false;

  std::array<int64_t, 3> noise() const { return {seed, probes, int64_t(gaussian)}; }
};

inline void check_rows(const at::Tensor& x, const at::Tensor& z, const char* name) {
  TORCH_CHECK(
      x.sizes() == z.sizes() && x.scalar_type() == z.scalar_type() && x.device() == z.device(),
      name, " must be like z, ", z.sizes(), " of ", z.scalar_type(), ", got ", x.sizes(), " of ",
      x.scalar_type());
}

inline void check_columns(const at::Tensor& x, const at::Tensor& z, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) > 0 && x.size(1) == z.size(0) && x.size(2) == z.size(1) &&
                  x.scalar_type() == z.scalar_type() && x.device() == z.device(),
              name, " must be [K, ", z.size(0), ", ", z.size(1), "] of ", z.scalar_type(),
              " with K of at least 1, got ", x.sizes(), " of ", x.scalar_type());
}

// What does not depend on the number of samples; the rest is checked by MlpSetup.
inline void check_arguments(const FieldArguments& arguments) {
  const auto& [t, z, probe, context, parameters, kind, jvp, keys, seed, probes, gaussian] =
      arguments;
  TORCH_CHECK(z.dim() == 2 && (z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble),
              "z must be [B, D] of float32 or float64, got ", z.sizes(), " of ", z.scalar_type());
  TORCH_CHECK(t.scalar_type() == z.scalar_type() && t.device() == z.device() &&
                  (t.dim() == 0 || (t.dim() == 1 && t.size(0) == z.size(0))),
              "t must be 0-dim or [", z.size(0), "] of ", z.scalar_type(), ", got ", t.sizes(),
              " of ", t.scalar_type());
  TORCH_CHECK((kind.size() == 5 || kind.size() == 6) && kind[3] == 0 && kind[4] == 0,
              "kind must be 5 or 6 numbers, the fourth and fifth 0, got ", kind);
  if (jvp) return;
  const bool drawn = keys.has_value();
  TORCH_CHECK(Divergence(kind[2]) == Divergence::kProbes ? probe.has_value() != drawn
                                                         : !probe.has_value() && !drawn,
              "probe or keys, one of them, belong to a divergence by probes, and to no other");
  if (probe.has_value()) check_columns(*probe, z, "probe");
  TORCH_CHECK(!drawn || (keys->dim() == 1 && keys->size(0) == z.size(0) &&
                         keys->scalar_type() == at::kLong && keys->device() == z.device()),
              "keys must be int64 [", z.size(0), "], got ", keys->scalar_type(), " ",
              keys->sizes());
  TORCH_CHECK(!drawn || probes > 0, "probes must be at least 1, got ", probes);
}

inline void check_divergence_bar(const std::optional<at::Tensor>& bar, const at::Tensor& z,
                                 at::IntArrayRef kind) {
  TORCH_CHECK(
      !bar.has_value() ||
          (kind.size() > 2 && kind[2] != 0 && bar->dim() == 1 && bar->size(0) == z.size(0) &&
           bar->scalar_type() == z.scalar_type() && bar->device() == z.device()),
      "divergence_bar must be [", z.size(0), "] of ", z.scalar_type(), ", with a divergence; got ",
      bar->sizes(), " of ", bar->scalar_type());
}

inline void check_images_bar(const std::optional<at::Tensor>& bar, const at::Tensor& tangents) {
  TORCH_CHECK(!bar.has_value() || (bar->sizes() == tangents.sizes() &&
                                   bar->scalar_type() == tangents.scalar_type() &&
                                   bar->device() == tangents.device()),
              "images_bar must be like tangents, ", tangents.sizes(), " of ",
              tangents.scalar_type(), ", got ", bar->sizes(), " of ", bar->scalar_type());
}

// The `kind` of a solve, where tangents are probes.
inline std::vector<int64_t> solver_kind(const FieldArguments& arguments) {
  auto kind = arguments.kind.vec();
  if (arguments.jvp) kind[2] = int64_t(Divergence::kProbes);
  return kind;
}

// Of z, t, the context, the tangents or probe, and the parameters.
using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

// Gradients of no samples.
inline Gradients zeros(const FieldArguments& arguments, bool need_parameters) {
  const auto options = arguments.z.options();
  const auto like = [&](const std::optional<at::Tensor>& x, bool wanted) {
    return at::zeros(wanted && x.has_value() ? x->sizes() : at::IntArrayRef{0}, options);
  };
  std::vector<at::Tensor> bars;
  for (size_t i = 0; i < arguments.parameters.size(); ++i) {
    bars.push_back(like(arguments.parameters.get(i), need_parameters));
  }
  return {like(arguments.z, true), like(arguments.t, need_parameters),
          like(arguments.context, true), like(arguments.probe, true), bars};
}

}  // namespace pycnf
