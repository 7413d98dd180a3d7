// The kernels for f32 with products in bf16.

#include "cuda/mlp_instances.cuh"

namespace pycnf {

PYCNF_MLP_KERNELS(float, Precision::kBf16);

}  // namespace pycnf
