// The fused engine's field as ops: one evaluation, and its reverse.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "torch/mlp_gradient.h"
#include "torch/recycled.h"

namespace pycnf {
namespace {

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
};

void check_rows(const at::Tensor& x, const at::Tensor& z, const char* name) {
  TORCH_CHECK(x.sizes() == z.sizes() && x.scalar_type() == z.scalar_type() && x.is_cpu(), name,
              " must be like z, ", z.sizes(), " of ", z.scalar_type(), ", got ", x.sizes(), " of ",
              x.scalar_type());
}

void check_columns(const at::Tensor& x, const at::Tensor& z, const char* name) {
  TORCH_CHECK(x.dim() == 3 && x.size(0) > 0 && x.size(1) == z.size(0) && x.size(2) == z.size(1) &&
                  x.scalar_type() == z.scalar_type() && x.is_cpu(),
              name, " must be [K, ", z.size(0), ", ", z.size(1), "] of ", z.scalar_type(),
              " with K of at least 1, got ", x.sizes(), " of ", x.scalar_type());
}

// What does not depend on the number of samples; the rest is checked by MlpSetup.
void check_arguments(const FieldArguments& arguments) {
  const auto& [t, z, probe, context, parameters, kind, jvp, keys, seed, probes, gaussian] =
      arguments;
  TORCH_CHECK(z.dim() == 2 && (z.scalar_type() == at::kFloat || z.scalar_type() == at::kDouble),
              "z must be [B, D] of float32 or float64, got ", z.sizes(), " of ", z.scalar_type());
  TORCH_CHECK(t.scalar_type() == z.scalar_type() && t.is_cpu() &&
                  (t.dim() == 0 || (t.dim() == 1 && t.size(0) == z.size(0))),
              "t must be 0-dim or [", z.size(0), "] of ", z.scalar_type(), ", got ", t.sizes(),
              " of ", t.scalar_type());
  TORCH_CHECK(kind.size() == 5 && kind[3] == 0 && kind[4] == 0,
              "kind must be 5 numbers, the last two 0, got ", kind);
  if (jvp) return;
  const bool drawn = keys.has_value();
  TORCH_CHECK(Divergence(kind[2]) == Divergence::kProbes ? probe.has_value() != drawn
                                                         : !probe.has_value() && !drawn,
              "probe or keys, one of them, belong to a divergence by probes, and to no other");
  if (probe.has_value()) check_columns(*probe, z, "probe");
  TORCH_CHECK(!drawn || (keys->dim() == 1 && keys->size(0) == z.size(0) &&
                         keys->scalar_type() == at::kLong && keys->is_cpu()),
              "keys must be int64 [", z.size(0), "], got ", keys->scalar_type(), " ",
              keys->sizes());
  TORCH_CHECK(!drawn || probes > 0, "probes must be at least 1, got ", probes);
}

// One call's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class Field {
 public:
  Field(const FieldArguments& arguments, int64_t cotangents)
      : own_times(arguments.t.dim() == 1),
        setup(arguments.z,
              {arguments.probe, arguments.context, arguments.parameters, "euler",
               kind_of(arguments), kWeights, arguments.keys.has_value() ? arguments.probes : 0},
              own_times, false),
        numbers_(setup.table.field_numbers(setup.solve, cotangents)),
        workspace_(recycled(setup.chunks * (numbers_ + kAlign<T>), setup.options)),
        t_(arguments.t.contiguous()),
        z_(arguments.z.contiguous()) {
    inputs.batch = setup.batch;
    inputs.z = values<T>(z_);
    if (setup.probe.defined()) inputs.tangents = values<T>(setup.probe);
    if (arguments.keys.has_value()) {
      keys_ = arguments.keys->contiguous();
      inputs.keys = keys_.const_data_ptr<int64_t>();
      inputs.seed = uint64_t(arguments.seed);
      inputs.gaussian = arguments.gaussian;
    }
    if (setup.context.defined()) inputs.context = values<T>(setup.context);
    TORCH_INTERNAL_ASSERT(kKeptSamples % setup.samples == 0);
  }

  // Numbers that are kept of an evaluation.
  int64_t kept_numbers() const {
    const int64_t rows = setup.kept_numbers / setup.samples;
    return (setup.batch + kKeptSamples - 1) / kKeptSamples * kKeptSamples * rows;
  }

  at::Tensor keep(bool wanted) {
    auto kept = recycled(wanted ? kept_numbers() : 0, setup.options);
    if (!wanted) return kept;
    inputs.kept = mutable_values<T>(kept);
    // No result of an op may be a matter of chance.
    kept.slice(0, setup.tiles * setup.kept_numbers).zero_();
    return kept;
  }

  void use(const at::Tensor& kept) {
    if (kept.numel() == 0) return;
    TORCH_CHECK(kept.numel() == kept_numbers() && kept.is_contiguous() &&
                    kept.scalar_type() == setup.dtype(),
                "kept must be what the forward op kept, ", kept_numbers(), " numbers, got ",
                kept.sizes());
    inputs.kept = mutable_values<T>(kept);
  }

  // Calls body(chunk, tile, inputs, memory) for every tile and end(chunk, at) after a thread's last;
  // the network at the tile's time or times comes with its rates if wanted.
  template <typename Body, typename End>
  void for_each_tile(bool rates, const Body& body, const End& end) const {
    MlpTimes<T> shared;
    if (!own_times) {
      const double t = double(*values<T>(t_));
      setup.prepare(1, &t, rates, false, shared);
    }
    setup.for_each_chunk([&](int64_t chunk) {
      MlpTimes<T> own;
      std::vector<double> times(own_times ? setup.samples : 0);
      MlpFieldInputs<T> of_tile = inputs;
      of_tile.at = shared.at.data();
      for (int64_t tile = setup.first_tile(chunk); tile < setup.first_tile(chunk + 1); ++tile) {
        for (int64_t s = 0; s < int64_t(times.size()); ++s) {
          times[s] = double(values<T>(t_)[std::min(tile * setup.samples + s, setup.batch - 1)]);
        }
        if (own_times) {
          setup.prepare(1, times.data(), rates, false, own);
          of_tile.at = own.at.data();
        }
        T* memory = mutable_values<T>(workspace_) + chunk * (numbers_ + kAlign<T>);
        body(chunk, tile, of_tile, aligned(memory));
      }
      end(chunk, of_tile.at);
    });
  }

  const CpuMlpField<T>& kernels() const {
    return own_times ? setup.table.own_field : setup.table.shared_field;
  }

  const bool own_times;
  const MlpSetup<T> setup;
  MlpFieldInputs<T> inputs = {};

 private:
  static constexpr double kWeights[3] = {1, 0, 0};

  static std::vector<int64_t> kind_of(const FieldArguments& arguments) {
    auto kind = arguments.kind.vec();
    if (arguments.jvp) kind[2] = int64_t(Divergence::kProbes);
    return kind;
  }

  int64_t numbers_;
  at::Tensor workspace_, t_, z_, keys_;
};

const auto kNothing = [](int64_t, const auto*) {};

// ---- forward ------------------------------------------------------------------------------------

// f, the divergence or the images (undefined without), and what is kept.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const FieldArguments& arguments, bool keep) {
  check_arguments(arguments);
  const auto& z = arguments.z;
  auto value = at::empty(z.sizes(), z.options());
  at::Tensor second, kept;
  const bool divergence = !arguments.jvp && arguments.kind[2] != 0;
  if (divergence) second = at::empty({z.size(0)}, z.options());
  if (arguments.jvp) second = at::empty(arguments.probe->sizes(), z.options());
  if (z.size(0) == 0) return {value, second, at::empty({0}, z.options())};
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_field", [&] {
    Field<scalar_t> field(arguments, 0);
    kept = field.keep(keep);
    const MlpFieldForward<scalar_t> results = {
        mutable_values<scalar_t>(value),
        divergence ? mutable_values<scalar_t>(second) : nullptr,
        arguments.jvp ? mutable_values<scalar_t>(second) : nullptr,
    };
    field.for_each_tile(
        false,
        [&](int64_t, int64_t tile, const auto& inputs, scalar_t* memory) {
          field.kernels().forward(field.setup.solve, inputs, results, tile, memory);
        },
        kNothing);
  });
  return {value, second, kept};
}

std::tuple<at::Tensor, at::Tensor> mlp_value_cpu(const at::Tensor& t, const at::Tensor& z,
                                                 const std::optional<at::Tensor>& context,
                                                 const Parameters& parameters, at::IntArrayRef kind,
                                                 bool keep) {
  TORCH_CHECK(kind.size() != 5 || kind[2] == 0, "kind must have no divergence, got ", kind);
  const auto [value, none, kept] = forward({t, z, {}, context, parameters, kind}, keep);
  return {value, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_value_jvp_cpu(
    const at::Tensor& t, const at::Tensor& z, const at::Tensor& tangents,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    bool keep) {
  check_columns(tangents, z, "tangents");
  return forward({t, z, tangents, context, parameters, kind, true}, keep);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_value_divergence_cpu(
    const at::Tensor& t, const at::Tensor& z, const std::optional<at::Tensor>& probe,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    const std::optional<at::Tensor>& keys, int64_t seed, int64_t probes, bool gaussian, bool keep) {
  TORCH_CHECK(kind.size() != 5 || kind[2] != 0, "kind must have a divergence, got ", kind);
  return forward({t, z, probe, context, parameters, kind, false, keys, seed, probes, gaussian},
                 keep);
}

std::tuple<at::Tensor, at::Tensor> mlp_vjp_cpu(const at::Tensor& t, const at::Tensor& z,
                                               const at::Tensor& cotangents,
                                               const std::optional<at::Tensor>& context,
                                               const Parameters& parameters, at::IntArrayRef kind) {
  const FieldArguments arguments = {t, z, {}, context, parameters, kind};
  TORCH_CHECK(kind.size() != 5 || kind[2] == 0, "kind must have no divergence, got ", kind);
  check_arguments(arguments);
  check_columns(cotangents, z, "cotangents");
  auto value = at::empty(z.sizes(), z.options());
  auto products = at::empty(cotangents.sizes(), z.options());
  if (z.size(0) == 0) return {value, products};
  const auto rows = cotangents.contiguous();
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_vjp", [&] {
    const Field<scalar_t> field(arguments, rows.size(0));
    const MlpFieldVjp<scalar_t> results = {rows.size(0), values<scalar_t>(rows),
                                           mutable_values<scalar_t>(value),
                                           mutable_values<scalar_t>(products)};
    field.for_each_tile(
        false,
        [&](int64_t, int64_t tile, const auto& inputs, scalar_t* memory) {
          field.kernels().vjp(field.setup.solve, inputs, results, tile, memory);
        },
        kNothing);
  });
  return {value, products};
}

// ---- reverse ------------------------------------------------------------------------------------

using Gradients =
    std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, std::vector<at::Tensor>>;

template <typename T>
Gradients reverse(const FieldArguments& arguments, const at::Tensor& value_bar,
                  const at::Tensor& second_bar, const at::Tensor& kept, bool need_parameters) {
  Field<T> field(arguments, 0);
  field.use(kept);
  const auto& setup = field.setup;
  auto like = [&](const at::Tensor& x) {
    return x.defined() ? at::empty(x.sizes(), setup.options) : at::empty({0}, setup.options);
  };
  auto z_bar = like(arguments.z), context_bar = like(setup.context), probe_bar = like(setup.probe);
  std::vector<double> times_bar(
      need_parameters ? (field.own_times ? setup.batch : setup.tiles + setup.chunks) : 0);

  MlpFieldReverse<T> common = {};
  if (value_bar.defined()) common.value_bar = values<T>(value_bar);
  if (second_bar.defined()) {
    (arguments.jvp ? common.images_bar : common.divergence_bar) = values<T>(second_bar);
  }
  common.z_bar = mutable_values<T>(z_bar);
  if (setup.context.defined()) common.context_bar = mutable_values<T>(context_bar);
  if (setup.probe.defined()) common.tangents_bar = mutable_values<T>(probe_bar);
  if (need_parameters) common.time_bar = times_bar.data();

  GradientSums<T> sums(setup, need_parameters ? 1 : 0);
  // Each thread's cotangents of M, used up at its end.
  std::vector<std::optional<MixedBars<T>>> mixed(setup.chunks);
  for (auto& of_chunk : mixed) of_chunk.emplace(setup, 1, true);
  field.for_each_tile(
      need_parameters,
      [&](int64_t chunk, int64_t tile, const auto& inputs, T* memory) {
        MlpFieldReverse<T> results = common;
        if (need_parameters) results.gradients = sums.layers(chunk, 0);
        results.mixed_bar = mixed[chunk]->pointers()[0];
        field.kernels().reverse(setup.solve, inputs, results, tile, memory);
      },
      [&](int64_t chunk, const MlpAt<T>* at) {
        if (!need_parameters) return;
        const double time_bar = double(mixed[chunk]->unmix(0, *at, sums.layers(chunk, 0)));
        // Of a time per sample M is no function.
        if (!field.own_times) times_bar[setup.tiles + chunk] = time_bar;
      });

  auto t_bar = at::empty(need_parameters ? arguments.t.sizes() : at::IntArrayRef{0}, setup.options);
  std::vector<at::Tensor> bars;
  if (!need_parameters) {
    for (size_t i = 0; i < arguments.parameters.size(); ++i) {
      bars.push_back(at::empty({0}, setup.options));
    }
    return {z_bar, t_bar, context_bar, probe_bar, bars};
  }
  T* t = mutable_values<T>(t_bar);
  if (field.own_times) {
    std::copy(times_bar.begin(), times_bar.end(), t);
  } else {
    double sum = 0;
    for (const double of : times_bar) sum += of;
    *t = T(sum);
  }
  sums.reduce(0);
  return {z_bar, t_bar, context_bar, probe_bar,
          sums.tensors(sums.numbers(0, 0), arguments.parameters)};
}

// Gradients of no samples.
Gradients zeros(const FieldArguments& arguments, bool need_parameters) {
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

Gradients backward(const FieldArguments& arguments, const std::optional<at::Tensor>& value_bar,
                   const std::optional<at::Tensor>& second_bar, const at::Tensor& kept,
                   bool need_parameters) {
  check_arguments(arguments);
  const auto& z = arguments.z;
  if (value_bar.has_value()) check_rows(*value_bar, z, "value_bar");
  if (z.size(0) == 0) return zeros(arguments, need_parameters);
  const auto contiguous = [](const std::optional<at::Tensor>& x) {
    return x.has_value() ? x->contiguous() : at::Tensor();
  };
  Gradients result;
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_field_backward", [&] {
    result = reverse<scalar_t>(arguments, contiguous(value_bar), contiguous(second_bar), kept,
                               need_parameters);
  });
  return result;
}

Gradients mlp_value_divergence_backward_cpu(
    const std::optional<at::Tensor>& value_bar, const std::optional<at::Tensor>& divergence_bar,
    const at::Tensor& t, const at::Tensor& z, const std::optional<at::Tensor>& probe,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    const std::optional<at::Tensor>& keys, int64_t seed, int64_t probes, bool gaussian,
    const at::Tensor& kept, bool need_parameters) {
  TORCH_CHECK(!divergence_bar.has_value() ||
                  (kind.size() == 5 && kind[2] != 0 && divergence_bar->dim() == 1 &&
                   divergence_bar->size(0) == z.size(0) &&
                   divergence_bar->scalar_type() == z.scalar_type() && divergence_bar->is_cpu()),
              "divergence_bar must be [", z.size(0), "] of ", z.scalar_type(),
              ", with a divergence; got ", divergence_bar->sizes(), " of ",
              divergence_bar->scalar_type());
  return backward({t, z, probe, context, parameters, kind, false, keys, seed, probes, gaussian},
                  value_bar, divergence_bar, kept, need_parameters);
}

Gradients mlp_value_jvp_backward_cpu(const std::optional<at::Tensor>& value_bar,
                                     const std::optional<at::Tensor>& images_bar,
                                     const at::Tensor& t, const at::Tensor& z,
                                     const at::Tensor& tangents,
                                     const std::optional<at::Tensor>& context,
                                     const Parameters& parameters, at::IntArrayRef kind,
                                     const at::Tensor& kept, bool need_parameters) {
  check_columns(tangents, z, "tangents");
  TORCH_CHECK(!images_bar.has_value() || (images_bar->sizes() == tangents.sizes() &&
                                          images_bar->scalar_type() == z.scalar_type()),
              "images_bar must be like tangents, ", tangents.sizes(), " of ", z.scalar_type(),
              ", got ", images_bar->sizes(), " of ", images_bar->scalar_type());
  return backward({t, z, tangents, context, parameters, kind, true}, value_bar, images_bar, kept,
                  need_parameters);
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("mlp_value", mlp_value_cpu);
  m.impl("mlp_value_jvp", mlp_value_jvp_cpu);
  m.impl("mlp_vjp", mlp_vjp_cpu);
  m.impl("mlp_value_divergence", mlp_value_divergence_cpu);
  m.impl("mlp_value_divergence_backward", mlp_value_divergence_backward_cpu);
  m.impl("mlp_value_jvp_backward", mlp_value_jvp_backward_cpu);
}

}  // namespace pycnf
