// The fused engine's field as ops: one evaluation, and its reverse.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <torch/library.h>

#include "torch/mlp_field_arguments.h"
#include "torch/mlp_gradient.h"
#include "torch/recycled.h"

namespace pycnf {
namespace {

// One call's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class Field {
 public:
  Field(const FieldArguments& arguments, int64_t cotangents)
      : own_times(arguments.t.dim() == 1),
        setup(arguments.z,
              {arguments.probe, arguments.keys, arguments.noise(), arguments.context,
               arguments.parameters, "euler", solver_kind(arguments), kWeights},
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
  check_divergence_bar(divergence_bar, z, kind);
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
  check_images_bar(images_bar, tangents);
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
