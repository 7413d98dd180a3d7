// The kernels for f32, with products in f32.

#include "cuda/mlp_instances.cuh"

namespace pycnf {

PYCNF_MLP_KERNELS(float, Precision::kFloat32);

}  // namespace pycnf
