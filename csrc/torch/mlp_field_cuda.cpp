// The field of a network of any width on a GPU: a product for each layer, and one pass over memory
// between two products (cuda/mlp_layer.h).
//
// Values and tangents are rows of the same matrices, [values; tangents]. Those of the first layer
// are apart: its tangents are constants of a solve, and for unit vectors the weight's columns. What
// an evaluation keeps are the products of all layers, without the first one's tangents. The host
// reads nothing of what it launches, so all of it can be captured in a CUDA graph.

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/core/grad_mode.h>
#include <torch/library.h>

#include <algorithm>

#include "core/params.h"
#include "cuda/kernels.h"
#include "cuda/mlp_layer.h"
#include "torch/cuda_device.h"
#include "torch/matrix_product.h"
#include "torch/mlp_field_arguments.h"
#include "torch/probes.h"

// Products of tangents that are in memory at a time, in numbers; more tangents take turns, and
// nothing is kept of them. pycnf/_ops.py knows it too.
#ifndef PYCNF_TANGENT_NUMBERS
#define PYCNF_TANGENT_NUMBERS (int64_t(1) << 28)
#endif

namespace pycnf {
namespace {

template <typename T>
T* pointer(const at::Tensor& x) {
  return x.defined() ? mutable_values<T>(x) : nullptr;
}

// Rows that go through the network together: the values, tangents [first, first + count), or both.
struct Pass {
  bool values;
  int64_t first;
  int64_t count;

  int64_t blocks() const { return (values ? 1 : 0) + count; }
};

// Products of every layer, [B, out] and [count * B, out].
struct Evaluation {
  explicit Evaluation(int layers) : value(layers), tangent(layers) {}

  std::vector<at::Tensor> value, tangent;
  at::Tensor trace;  // the divergence [B] in closed form
};

// One call's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class Field {
 public:
  explicit Field(const FieldArguments& arguments)
      : options(arguments.z.options().requires_grad(std::nullopt)),
        batch(arguments.z.size(0)),
        own_times(arguments.t.dim() == 1),
        z(arguments.z.contiguous()) {
    const auto kind = solver_kind(arguments);
    const double no_weights[3] = {1, 0, 0};
    const auto noise = arguments.noise();
    const MlpArguments of_solve = {arguments.probe,      arguments.keys, noise, arguments.context,
                                   arguments.parameters, "euler",        kind,  no_weights};
    check_devices(of_solve, z, "z");
    solve.own_times = own_times;
    read_solve(of_solve, arguments.z, solve, weights, [](const at::Tensor& x, int64_t) {
      return x.const_data_ptr<T>();  // read with their own strides
    });
    layers = solve.field.layers;
    last = layers - 1;
    tangents = solve.tangents;
    closed_form = solve.closed_form;
    context = read_context(of_solve, arguments.z, solve);
    t_ = arguments.t.contiguous();
    read_parameters(arguments.parameters);
    if (Divergence(kind[2]) == Divergence::kProbes) {
      probe = arguments.keys.has_value() ? draw(arguments) : arguments.probe->contiguous();
    }
    given_probe = probe.defined() && !arguments.keys.has_value();
    unit_vectors = Divergence(kind[2]) == Divergence::kUnitVectors;
  }

  // ---- sizes ------------------------------------------------------------------------------------

  int64_t out(int l) const { return solve.field.layer[l].out; }
  int64_t in(int l) const { return solve.field.layer[l].in; }

  // Tangents that go through the network together.
  int64_t tangents_at_once() const {
    int64_t outputs = 0;
    for (int l = 0; l < layers; ++l) outputs += out(l);
    const int64_t fit = PYCNF_TANGENT_NUMBERS / (batch * outputs);
    return std::min(tangents, std::max<int64_t>(fit, 1));
  }

  bool in_turns() const { return tangents > tangents_at_once(); }

  // Calls body for each turn of the tangents.
  template <typename Body>
  void for_each_turn(const Body& body) const {
    const int64_t most = tangents_at_once();
    for (int64_t first = 0; first < tangents; first += most) {
      body(Pass{false, first, std::min(most, tangents - first)});
    }
  }

  // Tangents of a pass in a layer's products: the closed form's do not meet the last weight.
  int64_t tangents_of(int l, const Pass& pass) const {
    return closed_form && l == last ? 0 : pass.count;
  }

  int64_t blocks(int l, const Pass& pass) const {
    return (pass.values ? 1 : 0) + tangents_of(l, pass);
  }

  int64_t kept_numbers() const {
    if (in_turns()) return 0;
    int64_t rows = out(0);
    for (int l = 1; l < layers; ++l) rows += blocks(l, {true, 0, tangents}) * out(l);
    return batch * rows;
  }

  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }

  // Of what samples have and a weight, or of two of what they have.
  void product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
               bool add = false) const {
    pycnf::product(solve.precision, out, a, b, add);
  }

  // ---- time -------------------------------------------------------------------------------------

  // Times of a layer: one, if it does the same to all samples.
  int64_t times(int l) const {
    const auto& layer = solve.field.layer[l];
    const bool timed = layer.gate_weight != nullptr || layer.shift_weight != nullptr;
    return own_times && timed ? batch : 1;
  }

  // Gates and shifts at the time or times.
  void prepare(bool rates) {
    const int64_t features = solve.field.time_features, count = own_times ? batch : 1;
    tau = t_.view({count, 1});
    if (solve.field.fourier) {
      const at::Tensor t = t_;
      tau = empty({count, features});
      if (rates) rate = empty({count, features});
      const TimeFeatureParams<T> p = {count, features, values<T>(t), pointer<T>(tau),
                                      pointer<T>(rate)};
      C10_CUDA_CHECK(launch_time_features(p, current_stream()));
    }
    TimeParams<T> p = {};
    p.layers = layers;
    p.features = features;
    p.tau = values<T>(tau);
    for (int l = 0; l < layers; ++l) {
      auto& timed = p.layer[l];
      timed.out = out(l);
      timed.times = times(l);
      timed.bias = parameter(l, 1);
      timed.gate_weight = parameter(l, 2);
      timed.gate_bias = parameter(l, 3);
      timed.shift_weight = parameter(l, 4);
      if (timed.gate_weight.numbers != nullptr)
        gate.push_back(empty({timed.times, out(l)}));
      else
        gate.emplace_back();
      shift.push_back(empty({timed.times, out(l)}));
      timed.gate = pointer<T>(gate[l]);
      timed.shift = pointer<T>(shift[l]);
    }
    C10_CUDA_CHECK(launch_time_layers(p, current_stream()));
    if (closed_form) mix();
  }

  // ---- forward ----------------------------------------------------------------------------------

  // A layer's products, for the kernels.
  LayerProducts<T> products(int l, const Evaluation& of, const Pass& pass) const {
    const bool columns = l == 0 && unit_vectors;  // of the weight
    LayerProducts<T> p = {};
    p.batch = batch;
    p.out = out(l);
    p.tangents = tangents_of(l, pass);
    p.value = pointer<T>(of.value[l]);
    p.context = l == 0 ? pointer<T>(context) : nullptr;
    p.tangent = p.tangents > 0 ? pointer<T>(of.tangent[l]) : nullptr;
    p.tangent_stride = (columns ? 1 : batch) * p.out;
    p.sample_stride = columns ? 0 : p.out;
    p.gate = pointer<T>(gate[l]);
    p.shift = pointer<T>(shift[l]);
    p.time_stride = times(l) > 1 ? p.out : 0;
    return p;
  }

  Probes<T> probes(const Pass& pass) const {
    const T* rows = probe.defined() ? values<T>(probe) + pass.first * z.numel() : nullptr;
    return {rows, pass.first, solve.probe_weight};
  }

  // Of the first layer: [count * B, out], or columns [count, out]; undefined for ones.
  at::Tensor first_tangents(const Pass& pass) const {
    if (pass.count == 0 || closed_form) return {};
    if (unit_vectors) return weights[0].t().narrow(0, pass.first, pass.count).contiguous();
    auto rows = empty({pass.count * batch, out(0)});
    product(rows, probe_rows(pass), weights[0].t());
    return rows;
  }

  at::Tensor probe_rows(const Pass& pass) const {
    return probe.narrow(0, pass.first, pass.count).view({pass.count * batch, in(0)});
  }

  // A pass through the network; that of tangents alone finds the values in `of`. `memory` [kept],
  // where the products go to, or undefined; without, what is used up is dropped if `drop`.
  void evaluate(const Pass& pass, Evaluation& of, const at::Tensor& memory, bool drop) const {
    int64_t taken = 0;
    const auto take = [&](int64_t rows, int64_t width) {
      if (!memory.defined()) return empty({rows, width});
      taken += rows * width;
      return memory.narrow(0, taken - rows * width, rows * width).view({rows, width});
    };
    if (pass.values) {
      of.value[0] = take(batch, out(0));
      product(of.value[0], z, weights[0].t());
    }
    of.tangent[0] = first_tangents(pass);
    for (int l = 1; l < layers; ++l) {
      const auto x = activate(l - 1, of, pass);
      if (drop) of.value[l - 1] = of.tangent[l - 1] = at::Tensor();
      const auto y = take(blocks(l, pass) * batch, out(l));
      if (closed_form && pass.count > 0) {
        product(y.narrow(0, 0, batch), x.narrow(0, 0, batch), weights[l].t());
        if (l < last) product(y.narrow(0, batch, batch), x.narrow(0, batch, batch), mixed.t());
      } else {
        product(y, x, weights[l].t());
      }
      assign(l, y, of, pass);
    }
  }

  // What was kept of an evaluation of all.
  Evaluation recall(const at::Tensor& memory) const {
    TORCH_CHECK(memory.numel() == kept_numbers() && memory.is_contiguous() &&
                    memory.scalar_type() == z.scalar_type() && memory.device() == z.device(),
                "kept must be what the forward op kept, ", kept_numbers(), " numbers, got ",
                memory.sizes());
    const Pass all = {true, 0, tangents};
    Evaluation of(layers);
    of.value[0] = memory.narrow(0, 0, batch * out(0)).view({batch, out(0)});
    int64_t taken = batch * out(0);
    for (int l = 1; l < layers; ++l) {
      const int64_t rows = blocks(l, all) * batch;
      assign(l, memory.narrow(0, taken, rows * out(l)).view({rows, out(l)}), of, all);
      taken += rows * out(l);
    }
    return of;
  }

  // f, divergence and images, as far as they are defined.
  void finish(const Evaluation& of, const Pass& pass, const at::Tensor& value,
              const at::Tensor& divergence, const at::Tensor& images) const {
    LastParams<T> p = {};
    p.products = products(last, of, pass);
    p.probes = probes(pass);
    if (pass.values) p.value = pointer<T>(value);
    if (p.products.tangents > 0) {
      p.divergence = pointer<T>(divergence);
      if (images.defined()) p.images = pointer<T>(images) + pass.first * z.numel();
    }
    p.add = pass.first > 0;
    C10_CUDA_CHECK(launch_last(p, current_stream()));
  }

  // ---- reverse ----------------------------------------------------------------------------------

  OutputParameter<T> parameter(int l, int which) const {
    const at::Tensor& x = parameters_[l * kPerLayer + which];
    if (!x.defined()) return {};
    return {values<T>(x), x.stride(0), x.dim() > 1 ? x.stride(1) : 1};
  }

  // The same as a matrix [out, count].
  at::Tensor parameter_matrix(int l, int which) const {
    return parameters_[l * kPerLayer + which].reshape({out(l), -1});
  }

  const at::TensorOptions options;
  const int64_t batch;
  const bool own_times;
  const at::Tensor z;
  MlpSolve<T> solve = {};
  std::vector<at::Tensor> weights;
  int layers = 0;
  int last = 0;
  int64_t tangents = 0;
  bool closed_form = false;
  bool unit_vectors = false;
  bool given_probe = false;
  at::Tensor probe;    // [K, B, D], given or drawn
  at::Tensor context;  // [B, width of the first layer]
  // By layer, undefined without.
  std::vector<at::Tensor> gate, shift;
  at::Tensor tau, rate;  // [times, F]
  // Of the closed form: diag(s) W₁ᵀ with the last gate s, N and M (or m) in core/mlp.h.
  at::Tensor scaled_first, unmixed, mixed;

 private:
  void read_parameters(const Parameters& parameters) {
    for (size_t i = 0; i < parameters.size(); ++i) {
      const std::optional<at::Tensor> x = parameters.get(i);
      parameters_.push_back(x.has_value() ? *x : at::Tensor());
    }
  }

  at::Tensor draw(const FieldArguments& arguments) const {
    return make_probes(*arguments.keys, arguments.seed, tangents, solve.field.features,
                       arguments.gaussian, z.scalar_type(), [](const auto& p) {
                         C10_CUDA_CHECK(launch_sample_probes(p, current_stream()));
                       });
  }

  // The closed form's M = W₂∘N, N = (W₁ diag(s) W)ᵀ with the last weight W; or m, N's diagonal.
  void mix() {
    scaled_first = weights[0].t();
    if (gate[last].defined()) scaled_first = scaled_first * gate[last].view({-1, 1});
    if (last == 1) {
      mixed = (scaled_first * weights[1]).sum(0);
      return;
    }
    unmixed = empty({out(1), out(0)});
    product_of_torch(unmixed, weights[2].t(), scaled_first);
    mixed = weights[1] * unmixed;
  }

  // A layer's outputs, rows of the next layer's product.
  at::Tensor activate(int l, Evaluation& of, const Pass& pass) const {
    const auto kind = solve.field.activation;
    const bool trace = closed_form && l + 1 == last && pass.count > 0;
    const int64_t blocks = trace ? 1 : pass.blocks();
    auto x = empty({blocks * batch, out(l)});
    T* const rows = pointer<T>(x);
    if (trace) {
      if (!of.trace.defined()) of.trace = empty({batch});
      const T* m = last == 1 ? values<T>(mixed) : nullptr;
      const TraceParams<T> p = {products(l, of, pass), m, rows, pointer<T>(of.trace)};
      C10_CUDA_CHECK(launch_trace(kind, p, current_stream()));
    } else {
      const ActivateParams<T> p = {products(l, of, pass), pass.values ? rows : nullptr,
                                   pass.values ? rows + batch * out(l) : rows};
      C10_CUDA_CHECK(launch_activate(kind, p, current_stream()));
    }
    return x;
  }

  // Hands a layer's rows [values; tangents] to an evaluation.
  void assign(int l, const at::Tensor& rows, Evaluation& of, const Pass& pass) const {
    const int64_t values = pass.values ? batch : 0, count = tangents_of(l, pass) * batch;
    if (pass.values) of.value[l] = rows.narrow(0, 0, batch);
    if (count > 0) of.tangent[l] = rows.narrow(0, values, count);
  }

  at::Tensor t_;
  std::vector<at::Tensor> parameters_;
};

// ---- reverse ------------------------------------------------------------------------------------

// Cotangents of a layer's products, rows [values; tangents]. The values' may be elsewhere.
struct ProductBars {
  at::Tensor rows;
  at::Tensor value;    // [B, out]
  at::Tensor tangent;  // [count * B, out]
};

// The gradient of one evaluation.
template <typename T>
class Reverse {
 public:
  // `images_bar` and `divergence_bar`: not both; undefined, as value_bar, for zeros.
  Reverse(const Field<T>& field, const at::Tensor& value_bar, const at::Tensor& divergence_bar,
          const at::Tensor& images_bar, bool need_parameters)
      : field_(field),
        value_bar_(value_bar),
        divergence_bar_(divergence_bar),
        images_bar_(images_bar),
        need_parameters_(need_parameters),
        // What nobody asks of tangents, they need not do.
        seen_(divergence_bar.defined() || images_bar.defined()),
        in_turns_(seen_ && field.in_turns()),
        z_bar_(at::empty(field.z.sizes(), field.options)),
        begun_(field.layers) {
    if (field.context.defined()) context_bar_ = at::empty(field.context.sizes(), field.options);
    if (field.given_probe) {
      probe_bar_ = seen_ ? at::empty(field.probe.sizes(), field.options)
                         : at::zeros(field.probe.sizes(), field.options);
    }
    for (int l = 0; l < field.layers; ++l) {
      if (in_turns_) inner_.push_back(field.empty({field.batch, field.out(l)}));
      if (!need_parameters) continue;
      weight_bars_.push_back(field.empty({field.out(l), field.in(l)}));
      const bool same = field.times(l) == 1;
      const int64_t rows = same ? 2 * partial_sums(field.batch) : 2 * field.batch;
      terms_.push_back(field.empty({rows, field.out(l)}));
    }
  }

  Gradients run(const Parameters& parameters, const at::Tensor& t, const at::Tensor& kept) {
    const Pass values = {true, 0, 0}, all = {true, 0, seen_ ? field_.tangents : 0};
    const auto options = field_.options;
    Evaluation of = kept.numel() > 0 ? field_.recall(kept) : Evaluation(field_.layers);
    if (in_turns_) {
      field_.evaluate(values, of, {}, false);
      field_.for_each_turn([&](const Pass& turn) {
        field_.evaluate(turn, of, {}, false);
        reverse(turn, of);
      });
      reverse(values, of);
    } else {
      if (kept.numel() == 0) {
        field_.evaluate(all, of, {}, false);
      } else {
        of.tangent[0] = field_.first_tangents(all);
      }
      reverse(all, of);
    }
    const auto nothing = at::empty({0}, options);
    const auto or_nothing = [&](const at::Tensor& x) { return x.defined() ? x : nothing; };
    std::vector<at::Tensor> bars(parameters.size(), nothing);
    auto t_bar = nothing;
    if (need_parameters_) {
      if (mixed_bar_.defined()) unmix();
      t_bar = of_parameters(parameters, t, bars);
    }
    return {z_bar_, t_bar, or_nothing(context_bar_), or_nothing(probe_bar_), bars};
  }

 private:
  void reverse(const Pass& pass, const Evaluation& of) {
    auto bars = reverse_last(pass, of);
    for (int l = field_.last; l > 0; --l) bars = reverse_layer(l, pass, of, bars);
    reverse_first(pass, bars);
  }

  // Memory for the cotangents of a layer's products; the first one's values are the context's.
  ProductBars make_bars(int l, int64_t blocks, const Pass& pass) const {
    const int64_t batch = field_.batch, values = pass.values ? 1 : 0;
    ProductBars bars = {field_.empty({blocks * batch, field_.out(l)}), {}, {}};
    if (pass.values) bars.value = bars.rows.narrow(0, 0, batch);
    if (pass.values && l == 0 && context_bar_.defined()) bars.value = context_bar_;
    if (blocks > values) bars.tangent = bars.rows.narrow(0, values * batch, pass.count * batch);
    return bars;
  }

  LayerSums<T> sums(int l, const Pass& pass) {
    LayerSums<T> to = {};
    if (pass.values && need_parameters_) {
      T* const terms = pointer<T>(terms_[l]);
      if (field_.times(l) == 1) {
        to.partial = terms;
      } else {
        to.shift = terms;
        to.product = terms + field_.batch * field_.out(l);
      }
    }
    if (in_turns_) {
      if (pass.values || pass.first > 0) to.inner = pointer<T>(inner_[l]);
      if (!pass.values) to.inner_out = pointer<T>(inner_[l]);
    }
    return to;
  }

  ProductBars reverse_last(const Pass& pass, const Evaluation& of) {
    const int last = field_.last;
    const auto bars = make_bars(last, field_.blocks(last, pass), pass);
    ReverseLastParams<T> p = {};
    p.products = field_.products(last, of, pass);
    p.probes = field_.probes(pass);
    p.values = pass.values;
    p.value_bar = pointer<T>(value_bar_);
    const int64_t first = pass.first * field_.z.numel();
    if (images_bar_.defined()) p.images_bar = pointer<T>(images_bar_) + first;
    p.divergence_bar = pointer<T>(divergence_bar_);
    p.value_product_bar = pointer<T>(bars.value);
    p.tangent_product_bar = pointer<T>(bars.tangent);
    if (probe_bar_.defined() && divergence_bar_.defined()) {
      p.probe_bar = pointer<T>(probe_bar_) + first;
    }
    p.sums = sums(last, pass);
    C10_CUDA_CHECK(launch_reverse_last(p, current_stream()));
    return bars;
  }

  // From the cotangents of a layer's products to those of the layer before.
  ProductBars reverse_layer(int l, const Pass& pass, const Evaluation& of, const ProductBars& u) {
    const auto& weight = field_.weights[l];
    const int64_t batch = field_.batch;
    const bool closed_form = field_.closed_form && pass.count > 0,
               trace = closed_form && l == field_.last;
    const auto bars = make_bars(l - 1, pass.blocks(), pass);
    if (closed_form) {
      field_.product(bars.rows.narrow(0, 0, batch), u.rows.narrow(0, 0, batch), weight);
      if (!trace) field_.product(bars.tangent, u.tangent, field_.mixed);
    } else {
      field_.product(bars.rows, u.rows, weight);
    }
    const auto x = need_parameters_ ? at::empty_like(bars.rows) : at::Tensor();
    ReverseParams<T> p = {};
    p.products = field_.products(l - 1, of, pass);
    if (pass.values) p.value_bar = pointer<T>(bars.rows);
    if (trace) {
      p.trace_bar = values<T>(divergence_bar_);
      if (field_.last == 1) p.mixed = values<T>(field_.mixed);
    } else {
      p.tangent_bar = pointer<T>(bars.tangent);
    }
    p.value_product_bar = pointer<T>(bars.value);
    if (l > 1 || needs_first_tangents()) p.tangent_product_bar = pointer<T>(bars.tangent);
    if (x.defined()) {
      p.value = pass.values ? pointer<T>(x) : nullptr;
      if (pass.count > 0) p.tangent = pointer<T>(x) + (pass.values ? batch * field_.in(l) : 0);
    }
    p.sums = sums(l - 1, pass);
    C10_CUDA_CHECK(launch_reverse(field_.solve.field.activation, p, current_stream()));
    if (need_parameters_) add_weight_bar(l, u, x, closed_form);
    return bars;
  }

  // Whether anybody asks for the cotangents of W₁ε.
  bool needs_first_tangents() const {
    return !field_.closed_form && (probe_bar_.defined() || need_parameters_);
  }

  void add_weight_bar(int l, const ProductBars& u, const at::Tensor& x, bool closed_form) {
    if (!closed_form) {
      field_.product(weight_bars_[l], u.rows.t(), x, begun_[l]);
      begun_[l] = true;
      return;
    }
    const int64_t batch = field_.batch;
    field_.product(weight_bars_[l], u.rows.narrow(0, 0, batch).t(), x.narrow(0, 0, batch));
    const auto slopes = x.narrow(0, batch, batch);
    if (l < field_.last) {
      mixed_bar_ = field_.empty({field_.out(l), field_.in(l)});
      field_.product(mixed_bar_, u.tangent.t(), slopes);
    } else if (l == 1) {
      mixed_bar_ = field_.empty({1, field_.in(l)});
      product_of_torch(mixed_bar_, divergence_bar_.view({1, batch}), slopes);
    }
  }

  void reverse_first(const Pass& pass, const ProductBars& u) {
    const auto& weight = field_.weights[0];
    if (pass.values) {
      field_.product(z_bar_, u.value, weight);
      if (need_parameters_) {
        field_.product(weight_bars_[0], u.value.t(), field_.z, begun_[0]);
        begun_[0] = true;
      }
    }
    if (pass.count == 0 || !needs_first_tangents()) return;
    if (need_parameters_ && field_.unit_vectors) {
      // Each tangent has a column of the weight to itself.
      const auto columns = u.tangent.view({pass.count, field_.batch, -1}).sum(1).t();
      auto to = weight_bars_[0].narrow(1, pass.first, pass.count);
      if (pass.values) {
        to.add_(columns);
      } else {
        to.copy_(columns);
      }
    } else if (need_parameters_) {
      field_.product(weight_bars_[0], u.tangent.t(), field_.probe_rows(pass), begun_[0]);
    }
    begun_[0] = true;
    if (!probe_bar_.defined()) return;
    field_.product(probe_bar_.narrow(0, pass.first, pass.count).view({-1, field_.in(0)}), u.tangent,
                   weight, divergence_bar_.defined());
  }

  // From the cotangent of the closed form's M or m to those of the weights and the last gate.
  void unmix() {
    const int last = field_.last;
    const auto& first = field_.weights[0];
    const auto& weight = field_.weights[last];
    at::Tensor first_bar;  // of W₁ᵀ [D, H], without the gate
    if (last == 1) {
      first_bar = mixed_bar_ * weight;
      weight_bars_[1].addcmul_(mixed_bar_, field_.scaled_first);
    } else {
      weight_bars_[1].addcmul_(mixed_bar_, field_.unmixed);
      mixed_bar_.mul_(field_.weights[1]);
      first_bar = field_.empty({field_.out(last), field_.out(0)});
      product_of_torch(first_bar, weight, mixed_bar_);
      product_of_torch(weight_bars_[last], field_.scaled_first, mixed_bar_.t(), true);
    }
    if (field_.gate[last].defined()) {
      gate_bar_ = (first_bar * first.t()).sum(1);
      first_bar.mul_(field_.gate[last].view({-1, 1}));
    }
    weight_bars_[0].add_(first_bar.t());
  }

  // Gradients of what layers are made of besides their weights, and of time.
  at::Tensor of_parameters(const Parameters& parameters, const at::Tensor& t,
                           std::vector<at::Tensor>& bars) const {
    SumParams<T> p = {};
    p.layers = field_.layers;
    p.count = partial_sums(field_.batch);
    p.features = field_.solve.field.time_features;
    p.tau = values<T>(field_.tau);
    p.rate = pointer<T>(field_.rate);
    int64_t outputs = 0;
    for (int l = 0; l < field_.layers; ++l) outputs += field_.out(l);
    auto time_terms = field_.empty({outputs});
    const bool one_time = !field_.own_times || field_.batch == 1;
    auto t_bar = one_time ? at::Tensor() : at::zeros(t.sizes(), field_.options);
    outputs = 0;
    for (int l = 0; l < field_.layers; ++l) {
      bars[l * kPerLayer] = weight_bars_[l];
      for (int which = 1; which < kPerLayer; ++which) {
        const std::optional<at::Tensor> x = parameters.get(l * kPerLayer + which);
        if (x.has_value()) bars[l * kPerLayer + which] = field_.empty(x->sizes());
      }
      p.layer[l] = summed(l, bars, mutable_values<T>(time_terms) + outputs);
      outputs += field_.out(l);
      if (field_.times(l) > 1) add_own_times(l, bars, t_bar);
    }
    C10_CUDA_CHECK(launch_sums(p, current_stream()));
    return one_time ? time_terms.sum().view(t.sizes()) : t_bar;
  }

  SummedOutputs<T> summed(int l, const std::vector<at::Tensor>& bars, T* time_bar) const {
    const auto bar = [&](int which) -> T* {
      const auto& x = bars[l * kPerLayer + which];
      return x.numel() > 0 ? mutable_values<T>(x) : nullptr;
    };
    SummedOutputs<T> of = {};
    of.out = field_.out(l);
    of.partial = field_.times(l) == 1 ? values<T>(terms_[l]) : nullptr;
    of.gate = pointer<T>(field_.gate[l]);
    of.gate_bar = l == field_.last ? pointer<T>(gate_bar_) : nullptr;
    of.bias = field_.parameter(l, 1);
    of.gate_weight = field_.parameter(l, 2);
    of.shift_weight = field_.parameter(l, 4);
    of.bias_bar = bar(1);
    of.gate_weight_bar = bar(2);
    of.gate_bias_bar = bar(3);
    of.shift_weight_bar = bar(4);
    of.time_bar = time_bar;
    return of;
  }

  // The same for a layer that does to every sample what belongs to its own time.
  void add_own_times(int l, const std::vector<at::Tensor>& bars, at::Tensor& t_bar) const {
    const int64_t batch = field_.batch;
    const auto bar = [&](int which) { return bars[l * kPerLayer + which]; };
    const auto shift_bar = terms_[l].narrow(0, 0, batch);
    const auto& s = field_.gate[l];
    const auto add = [&](int which, const at::Tensor& terms) {
      product_of_torch(bar(which).view({field_.out(l), -1}), terms.t(), field_.tau);
      auto of_features = field_.empty(field_.tau.sizes());
      product_of_torch(of_features, terms, field_.parameter_matrix(l, which));
      if (field_.rate.defined()) of_features.mul_(field_.rate);
      t_bar.add_(of_features.sum(1));
    };
    if (bar(1).numel() > 0) {
      bar(1).copy_((s.defined() ? s * shift_bar : shift_bar).sum(0).view(bar(1).sizes()));
    }
    if (s.defined()) {
      auto gate_bar = terms_[l].narrow(0, batch, batch);
      if (field_.parameter(l, 1).numbers != nullptr) {
        gate_bar = gate_bar + shift_bar * field_.parameter_matrix(l, 1).t();
      }
      gate_bar = gate_bar * (s * (1 - s));
      if (bar(3).numel() > 0) bar(3).copy_(gate_bar.sum(0).view(bar(3).sizes()));
      add(2, gate_bar);
    }
    if (bar(4).numel() > 0) add(4, shift_bar);
  }

  const Field<T>& field_;
  const at::Tensor value_bar_, divergence_bar_, images_bar_;
  const bool need_parameters_, seen_, in_turns_;
  at::Tensor z_bar_, context_bar_, probe_bar_;
  std::vector<bool> begun_;              // whether a weight's gradient has something to add to
  std::vector<at::Tensor> weight_bars_;  // [out, in]
  // Partial sums, or terms of all samples, of the shift's cotangent and then the product's.
  std::vector<at::Tensor> terms_;
  std::vector<at::Tensor> inner_;  // [B, out], where tangents take turns
  at::Tensor mixed_bar_;           // like Field::mixed
  at::Tensor gate_bar_;            // of the last gate [D], from the closed form
};

// ---- the ops ------------------------------------------------------------------------------------

// f, the divergence or the images (undefined without), and what is kept.
std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(const FieldArguments& arguments, bool keep) {
  check_arguments(arguments);
  const at::NoGradGuard no_grad;
  const CUDAGuard guard(arguments.z.device());
  const auto options = arguments.z.options().requires_grad(std::nullopt);
  auto value = at::empty(arguments.z.sizes(), options);
  at::Tensor divergence, images, kept = at::empty({0}, options);
  if (arguments.jvp) {
    images = at::empty(arguments.probe->sizes(), options);
  } else if (arguments.kind[2] != 0) {
    divergence = at::empty({arguments.z.size(0)}, options);
  }
  const auto& second = arguments.jvp ? images : divergence;
  if (arguments.z.size(0) == 0) return {value, second, kept};
  AT_DISPATCH_FLOATING_TYPES(arguments.z.scalar_type(), "mlp_field", [&] {
    Field<scalar_t> field(arguments);
    field.prepare(false);
    Evaluation of(field.layers);
    of.trace = divergence;
    at::Tensor memory;
    if (keep && field.kept_numbers() > 0)
      memory = kept = at::empty({field.kept_numbers()}, options);
    const bool in_turns = field.in_turns();
    const Pass first = {true, 0, in_turns ? 0 : field.tangents};
    field.evaluate(first, of, memory, !in_turns);
    field.finish(of, first, value, divergence, images);
    if (!in_turns) return;
    field.for_each_turn([&](const Pass& turn) {
      field.evaluate(turn, of, {}, false);
      field.finish(of, turn, value, divergence, images);
    });
  });
  return {value, second, kept};
}

std::tuple<at::Tensor, at::Tensor> mlp_value_cuda(const at::Tensor& t, const at::Tensor& z,
                                                  const std::optional<at::Tensor>& context,
                                                  const Parameters& parameters,
                                                  at::IntArrayRef kind, bool keep) {
  TORCH_CHECK(kind.size() != 5 || kind[2] == 0, "kind must have no divergence, got ", kind);
  const auto [value, none, kept] = forward({t, z, {}, context, parameters, kind}, keep);
  return {value, kept};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_value_jvp_cuda(
    const at::Tensor& t, const at::Tensor& z, const at::Tensor& tangents,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    bool keep) {
  check_columns(tangents, z, "tangents");
  return forward({t, z, tangents, context, parameters, kind, true}, keep);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> mlp_value_divergence_cuda(
    const at::Tensor& t, const at::Tensor& z, const std::optional<at::Tensor>& probe,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    const std::optional<at::Tensor>& keys, int64_t seed, int64_t probes, bool gaussian, bool keep) {
  TORCH_CHECK(kind.size() != 5 || kind[2] != 0, "kind must have a divergence, got ", kind);
  return forward({t, z, probe, context, parameters, kind, false, keys, seed, probes, gaussian},
                 keep);
}

// v_kᵀ ∂f/∂z [K, B, D] for cotangents v.
template <typename T>
void pull_back(const Field<T>& field, const Evaluation& of, const at::Tensor& cotangents,
               const at::Tensor& result) {
  const int64_t count = cotangents.size(0);
  auto u = cotangents;
  if (field.gate[field.last].defined()) u = u * field.gate[field.last];
  u = u.reshape({count * field.batch, field.z.size(1)});
  for (int l = field.last; l > 0; --l) {
    const auto bar = field.empty({count * field.batch, field.in(l)});
    field.product(bar, u, field.weights[l]);
    ReverseParams<T> p = {};
    p.products = field.products(l - 1, of, {true, 0, 0});
    p.products.tangents = count;
    p.tangent_bar = p.tangent_product_bar = pointer<T>(bar);
    C10_CUDA_CHECK(launch_reverse(field.solve.field.activation, p, current_stream()));
    u = bar;
  }
  field.product(result.view({count * field.batch, -1}), u, field.weights[0]);
}

std::tuple<at::Tensor, at::Tensor> mlp_vjp_cuda(const at::Tensor& t, const at::Tensor& z,
                                                const at::Tensor& cotangents,
                                                const std::optional<at::Tensor>& context,
                                                const Parameters& parameters,
                                                at::IntArrayRef kind) {
  const FieldArguments arguments = {t, z, {}, context, parameters, kind};
  TORCH_CHECK(kind.size() != 5 || kind[2] == 0, "kind must have no divergence, got ", kind);
  check_arguments(arguments);
  check_columns(cotangents, z, "cotangents");
  const at::NoGradGuard no_grad;
  const CUDAGuard guard(z.device());
  const auto options = z.options().requires_grad(std::nullopt);
  auto value = at::empty(z.sizes(), options), products = at::empty(cotangents.sizes(), options);
  if (z.size(0) == 0) return {value, products};
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_vjp", [&] {
    Field<scalar_t> field(arguments);
    field.prepare(false);
    Evaluation of(field.layers);
    field.evaluate({true, 0, 0}, of, {}, false);
    field.finish(of, {true, 0, 0}, value, {}, {});
    pull_back(field, of, cotangents, products);
  });
  return {value, products};
}

Gradients backward(const FieldArguments& arguments, const std::optional<at::Tensor>& value_bar,
                   const std::optional<at::Tensor>& second_bar, const at::Tensor& kept,
                   bool need_parameters) {
  check_arguments(arguments);
  const auto& z = arguments.z;
  if (value_bar.has_value()) check_rows(*value_bar, z, "value_bar");
  const at::NoGradGuard no_grad;
  if (z.size(0) == 0) return zeros(arguments, need_parameters);
  const CUDAGuard guard(z.device());
  const auto contiguous = [](const std::optional<at::Tensor>& x) {
    return x.has_value() ? x->contiguous() : at::Tensor();
  };
  const auto second = contiguous(second_bar);
  Gradients result;
  AT_DISPATCH_FLOATING_TYPES(z.scalar_type(), "mlp_field_backward", [&] {
    Field<scalar_t> field(arguments);
    field.prepare(need_parameters);
    Reverse<scalar_t> reverse(field, contiguous(value_bar), arguments.jvp ? at::Tensor() : second,
                              arguments.jvp ? second : at::Tensor(), need_parameters);
    result = reverse.run(arguments.parameters, arguments.t, kept);
  });
  return result;
}

Gradients mlp_value_divergence_backward_cuda(
    const std::optional<at::Tensor>& value_bar, const std::optional<at::Tensor>& divergence_bar,
    const at::Tensor& t, const at::Tensor& z, const std::optional<at::Tensor>& probe,
    const std::optional<at::Tensor>& context, const Parameters& parameters, at::IntArrayRef kind,
    const std::optional<at::Tensor>& keys, int64_t seed, int64_t probes, bool gaussian,
    const at::Tensor& kept, bool need_parameters) {
  check_divergence_bar(divergence_bar, z, kind);
  return backward({t, z, probe, context, parameters, kind, false, keys, seed, probes, gaussian},
                  value_bar, divergence_bar, kept, need_parameters);
}

Gradients mlp_value_jvp_backward_cuda(const std::optional<at::Tensor>& value_bar,
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

TORCH_LIBRARY_IMPL(pycnf, CUDA, m) {
  m.impl("mlp_value", mlp_value_cuda);
  m.impl("mlp_value_jvp", mlp_value_jvp_cuda);
  m.impl("mlp_vjp", mlp_vjp_cuda);
  m.impl("mlp_value_divergence", mlp_value_divergence_cuda);
  m.impl("mlp_value_divergence_backward", mlp_value_divergence_backward_cuda);
  m.impl("mlp_value_jvp_backward", mlp_value_jvp_backward_cuda);
}

}  // namespace pycnf
