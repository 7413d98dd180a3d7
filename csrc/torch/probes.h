// Probe keys and probes, whoever computes them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include "torch/arguments.h"

namespace pycnf {

// int64 [B], of the rows of x [B, ...]: hash(params, batch) fills them in.
template <typename Hash>
at::Tensor make_keys(const at::Tensor& x, const Hash& hash) {
  TORCH_CHECK(x.dim() >= 1, "x must be [B, ...], got a 0-dim tensor");
  const auto rows = x.contiguous();
  const int64_t batch = rows.size(0);
  auto keys = at::empty({batch}, rows.options().dtype(at::kLong));
  const int64_t features = batch > 0 ? rows.numel() / batch : 0;
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "probe_keys", [&] {
    const KeyParams<scalar_t> p = {rows.const_data_ptr<scalar_t>(), features,
                                   keys.data_ptr<int64_t>()};
    hash(p, batch);
  });
  return keys;
}

// [K, B, D]: sample(params) fills them in.
template <typename Sample>
at::Tensor make_probes(const at::Tensor& keys, int64_t seed, int64_t probes, int64_t features,
                       bool gaussian, at::ScalarType dtype, const Sample& sample) {
  check_keys(keys, probes, features);
  const auto contiguous = keys.contiguous();
  const int64_t batch = keys.numel();
  auto out = at::empty({probes, batch, features}, keys.options().dtype(dtype));
  AT_DISPATCH_FLOATING_TYPES(dtype, "probe_sample", [&] {
    const ProbeParams<scalar_t> p = {contiguous.const_data_ptr<int64_t>(),
                                     uint64_t(seed),
                                     probes,
                                     batch,
                                     features,
                                     gaussian,
                                     out.data_ptr<scalar_t>()};
    sample(p);
  });
  return out;
}

}  // namespace pycnf
