// The kernels for f32 with products in TF32.

#include "cuda/mlp_instances.cuh"

namespace pycnf {

PYCNF_MLP_KERNELS(float, Precision::kTf32);

}  // namespace pycnf
