// Probe keys and probes.

#include "torch/probe_cpu.h"

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "torch/cpu_kernels.h"
#include "torch/probes.h"

namespace pycnf {

at::Tensor probe_keys_cpu(const at::Tensor& x) {
  return make_keys(x, []<typename T>(const KeyParams<T>& p, int64_t batch) {
    const auto& table = cpu_kernels<T>();
    at::parallel_for(0, batch, std::max<int64_t>(1, kGrain / std::max<int64_t>(1, p.features)),
                     [&](int64_t begin, int64_t end) { table.hash_keys(p, begin, end); });
  });
}

at::Tensor probe_sample_cpu(const at::Tensor& keys, int64_t seed, int64_t probes, int64_t features,
                            bool gaussian, at::ScalarType dtype) {
  const auto sample = []<typename T>(const ProbeParams<T>& p) {
    const auto& table = cpu_kernels<T>();
    const int64_t each = std::max<int64_t>(1, p.probes * p.features);
    at::parallel_for(0, p.batch, std::max<int64_t>(1, kGrain / 4 / each),
                     [&](int64_t begin, int64_t end) { table.sample_probes(p, begin, end); });
  };
  return make_probes(keys, seed, probes, features, gaussian, dtype, sample);
}

TORCH_LIBRARY_IMPL(pycnf, CPU, m) {
  m.impl("probe_keys", probe_keys_cpu);
  m.impl("probe_sample", probe_sample_cpu);
}

}  // namespace pycnf
