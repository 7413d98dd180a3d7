// The kernels for f64.

#include "cuda/mlp_instances.cuh"

namespace pycnf {

PYCNF_MLP_KERNELS(double, Precision::kFloat32);

}  // namespace pycnf
