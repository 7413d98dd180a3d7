// Gradients of the leaf ops, made of other differentiable ops so that they can be differentiated
// again.

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <vector>

#include "torch/find_op.h"

namespace pycnf {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

at::Tensor combine(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights, double h,
                   const std::optional<at::Tensor>& h_graph, bool ordered) {
  static const auto op = find_op<decltype(combine)>("pycnf::rk_combine");
  return op.call(y, k, weights, h, h_graph, ordered);
}

// d/dy = g, d/dk_j = h w_j g, d/dh = <g, sum_j w_j k_j>.
struct Combine : torch::autograd::Function<Combine> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& y,
                            const std::optional<at::Tensor>& h_graph, at::TensorList k,
                            at::ArrayRef<double> weights, double h, bool ordered) {
    ctx->saved_data["weights"] = weights.vec();
    ctx->saved_data["h"] = h;
    ctx->saved_data["terms"] = int64_t(k.size());
    if (h_graph.has_value()) {
      variable_list saved = k.vec();
      saved.push_back(*h_graph);
      ctx->save_for_backward(std::move(saved));
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    return combine(y, k, weights, h, h_graph, ordered);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto& g = grads[0];
    const auto weights = ctx->saved_data["weights"].toDoubleVector();
    const double h = ctx->saved_data["h"].toDouble();
    const auto terms = ctx->saved_data["terms"].toInt();
    const auto saved = ctx->get_saved_variables();
    const bool differentiable_h = !saved.empty();
    // One gradient per argument (y, h_graph, each k, weights, h, ordered), but edges are counted over the
    // tensors alone.
    const int64_t first_k_edge = differentiable_h ? 2 : 1;
    variable_list result(terms + 5);
    result[0] = g;
    for (int64_t j = 0; j < terms; ++j) {
      if (!ctx->needs_input_grad(first_k_edge + j)) continue;
      if (weights[j] == 0.) {
        result[j + 2] = at::zeros_like(g);
      } else if (differentiable_h) {
        result[j + 2] = g * (saved[terms] * weights[j]);
      } else {
        result[j + 2] = g * (weights[j] * h);
      }
    }
    if (differentiable_h && ctx->needs_input_grad(1)) {
      auto total = at::zeros({}, g.options());
      for (int64_t j = 0; j < terms; ++j) {
        if (weights[j] != 0.) total = total + (g * saved[j]).sum() * weights[j];
      }
      result[1] = total;
    }
    return result;
  }
};

at::Tensor rk_combine_autograd(const at::Tensor& y, at::TensorList k, at::ArrayRef<double> weights,
                               double h, const std::optional<at::Tensor>& h_graph, bool ordered) {
  TORCH_CHECK(!h_graph.has_value() || h_graph->dim() == 0, "h_graph must be 0-dim, got ",
              h_graph.has_value() ? h_graph->sizes() : at::IntArrayRef());
  const auto graph = [](const at::Tensor& x) {
    return x.requires_grad() || x._fw_grad(0).defined();
  };
  bool wanted = graph(y) || (h_graph.has_value() && graph(*h_graph));
  for (const auto& row : k) wanted = wanted || graph(row);
  if (!wanted) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return combine(y, k, weights, h, h_graph, ordered);
  }
  // Gradients come in y's shape.
  std::vector<at::Tensor> rows = k.vec();
  for (auto& row : rows) {
    if (row.sizes() != y.sizes() && row.numel() == y.numel()) row = row.reshape(y.sizes());
  }
  return Combine::apply(y, h_graph, at::TensorList(rows), weights, h, ordered);
}

}  // namespace

TORCH_LIBRARY_IMPL(pycnf, Autograd, m) {
  m.impl("rk_combine", rk_combine_autograd);
  // The ops of the solver loops carry no gradient; without this, the dispatcher's general answer to
  // that costs as much as the op itself on a small state.
  for (const char* name : {"rk_stage", "rk_finish", "rk_interpolate", "rk_initial_norms"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

}  // namespace pycnf
