// Products of matrices on a GPU by torch, which has cuBLAS make them, in a Precision.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "core/mlp_solve.h"

namespace pycnf {

// out = a b, or out += a b, as torch makes products of f32 or f64.
inline void product_of_torch(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
                             bool add = false) {
  if (add) {
    out.addmm_(a, b);
  } else {
    at::Tensor result = out;
    at::mm_out(result, a, b);
  }
}

// The numbers that TF32 can hold, no larger than those of x.
inline at::Tensor part_in_tf32(const at::Tensor& x) {
  return x.view(at::kInt).bitwise_and(~0x1fff).view(at::kFloat);
}

// out = a b in f32, from factors in bf16.
inline void product_of_bf16(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b) {
  const auto op = c10::Dispatcher::singleton().findSchema({"aten::mm", "dtype_out"});
  TORCH_CHECK(op.has_value(), "products of bf16 with sums in float32 need torch 2.8");
  using Signature = at::Tensor&(const at::Tensor&, const at::Tensor&, at::ScalarType, at::Tensor&);
  at::Tensor result = out;
  op->typed<Signature>().call(a.to(at::kBFloat16), b.to(at::kBFloat16), at::kFloat, result);
}

// The one place where a product's precision is chosen. That TF32 is TF32 is torch's setting, which
// the caller has made (pycnf/nn/precision.py).
inline void product(Precision precision, const at::Tensor& out, const at::Tensor& a,
                    const at::Tensor& b, bool add) {
  switch (precision) {
    case Precision::kFloat32:
    case Precision::kTf32:
      return product_of_torch(out, a, b, add);
    case Precision::k3xTf32: {
      // A number is large + small; small times small is as small as what rounding leaves out.
      const auto large_a = part_in_tf32(a), large_b = part_in_tf32(b);
      product_of_torch(out, a - large_a, large_b, add);
      product_of_torch(out, large_a, b - large_b, true);
      return product_of_torch(out, large_a, large_b, true);
    }
    case Precision::kBf16: {
      const auto made = add ? at::empty_like(out) : out;
      product_of_bf16(made, a, b);
      if (add) out.add_(made);
      return;
    }
  }
}

}  // namespace pycnf
