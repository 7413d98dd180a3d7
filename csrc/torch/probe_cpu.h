// Random probes, on the CPU.
#pragma once

#include <ATen/ATen.h>

namespace pycnf {

// Of the rows of x [B, ...]: int64 [B].
at::Tensor probe_keys_cpu(const at::Tensor& x);

// [K, B, D].
at::Tensor probe_sample_cpu(const at::Tensor& keys, int64_t seed, int64_t probes, int64_t features,
                            bool gaussian, at::ScalarType dtype);

}  // namespace pycnf
