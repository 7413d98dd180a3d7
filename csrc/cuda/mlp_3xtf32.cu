// The kernels for f32 with products of TF32, three for one.

#include "cuda/mlp_instances.cuh"

namespace pycnf {

PYCNF_MLP_KERNELS(float, Precision::k3xTf32);

}  // namespace pycnf
