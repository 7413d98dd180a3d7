#include "torch/cpu_kernels.h"

#include <ATen/Version.h>

#include <string>

namespace pycnf {

namespace {

const CpuKernels& choose() {
#if defined(PYCNF_X86)
  // ATEN_CPU_CAPABILITY is already taken into account here.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return cpu_avx512::kKernels;
  if (capability == "AVX2") return cpu_avx2::kKernels;
#endif
  return cpu_baseline::kKernels;
}

}  // namespace

const CpuKernels& cpu_kernels_of_this_machine() {
  static const CpuKernels& chosen = choose();
  return chosen;
}

}  // namespace pycnf
