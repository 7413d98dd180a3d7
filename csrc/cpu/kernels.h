// The CPU kernels as one table of functions per instruction set. No torch here.
#pragma once

#include "core/params.h"

namespace pycnf {

// Ranges [begin, end) count elements, or samples for the probe functions; the caller splits the
// work over threads.
template <typename T>
struct CpuKernelTable {
  void (*stage)(const StageParams<T>& p, int64_t begin, int64_t end);
  NormPartial (*finish)(const FinishParams<T>& p, int64_t begin, int64_t end);
  void (*interpolate)(const InterpolateParams<T>& p, int64_t begin, int64_t end);
  NormPartial (*initial)(const InitialParams<T>& p, int64_t begin, int64_t end);
  void (*sample_probes)(const ProbeParams<T>& p, int64_t begin, int64_t end);
  void (*hash_keys)(const KeyParams<T>& p, int64_t begin, int64_t end);
};

struct CpuKernels {
  const char* instruction_set;
  CpuKernelTable<float> f32;
  CpuKernelTable<double> f64;
};

// One per object library; see kernels_isa.cpp. Only the baseline exists off x86.
namespace cpu_baseline {
extern const CpuKernels kKernels;
}
namespace cpu_avx2 {
extern const CpuKernels kKernels;
}
namespace cpu_avx512 {
extern const CpuKernels kKernels;
}

}  // namespace pycnf
