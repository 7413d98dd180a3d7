// Probe keys and probes.

#include "torch/probe_cpu.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/arguments.h"
#include "torch/cpu_kernels.h"

namespace pycnf {

at::Tensor probe_keys_cpu(const at::Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, "x must be [B, ...], got a 0-dim tensor");
  const auto rows = x.contiguous();
  const int64_t batch = rows.size(0);
  auto keys = at::empty({batch}, rows.options().dtype(at::kLong));
  const int64_t features = batch > 0 ? rows.numel() / batch : 0;
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "probe_keys", [&] {
    const KeyParams<scalar_t> p = {rows.const_data_ptr<scalar_t>(), features,
                                   keys.data_ptr<int64_t>()};
    const auto& table = cpu_kernels<scalar_t>();
    at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, features)),
                     [&](int64_t begin, int64_t end) { table.hash_keys(p, begin, end); });
  });
  return keys;
}

at::Tensor probe_sample_cpu(const at::Tensor& keys, int64_t seed, int64_t probes, int64_t features,
                            bool gaussian, at::ScalarType dtype) {
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
    const auto& table = cpu_kernels<scalar_t>();
    const int64_t each = std::max<int64_t>(1, probes * features);
    at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / 4 / each),
                     [&](int64_t begin, int64_t end) { table.sample_probes(p, begin, end); });
  });
  return out;
}

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("probe_keys", probe_keys_cpu);
  m.impl("probe_sample", probe_sample_cpu);
}

}  // namespace pycnf
