#include "torch/cpu_kernels.h"

#include <ATen/Version.h>

#include <string>

namespace pycnf {

namespace {

struct Chosen {
  const CpuKernels& kernels;
  const CpuMlpKernels& mlp_kernels;
};

Chosen choose() {
#if defined(PYCNF_X86)
  // ATEN_CPU_CAPABILITY is already taken into account here.
  const std::string capability = at::get_cpu_capability();
  if (capability == "AVX512") return {cpu_avx512::kKernels, cpu_avx512::kMlpKernels};
  if (capability == "AVX2") return {cpu_avx2::kKernels, cpu_avx2::kMlpKernels};
#endif
  return {cpu_baseline::kKernels, cpu_baseline::kMlpKernels};
}

const Chosen& chosen() {
  static const Chosen the = choose();
  return the;
}

}  // namespace

const CpuKernels& cpu_kernels_of_this_machine() { return chosen().kernels; }

const CpuMlpKernels& cpu_mlp_kernels_of_this_machine() { return chosen().mlp_kernels; }

}  // namespace pycnf
