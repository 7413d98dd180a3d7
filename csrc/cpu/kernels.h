// The CPU kernels as one table of functions per instruction set. No torch here.
#pragma once

#include "core/mlp_field.h"
#include "core/mlp_solve.h"
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
  void (*broyden_step)(const BroydenParams<T>& p);
  void (*sample_probes)(const ProbeParams<T>& p, int64_t begin, int64_t end);
  void (*hash_keys)(const KeyParams<T>& p, int64_t begin, int64_t end);
};

struct CpuKernels {
  const char* instruction_set;
  CpuKernelTable<float> f32;
  CpuKernelTable<double> f64;
};

// The fused engine. Functions of a tile take its number and memory for workspace_numbers().
template <typename T>
struct CpuMlpSteps {
  void (*first_stage)(const MlpSolve<T>&, const MlpAttempt<T>&, int64_t tile, T* memory);
  void (*trial)(const MlpSolve<T>&, const MlpAttempt<T>&, int64_t tile, T* memory);
  void (*attempt)(const MlpSolve<T>&, const MlpAttempt<T>&, int64_t tile, T* memory);
  void (*reverse)(const MlpSolve<T>&, const MlpReverseStep<T>&, int64_t tile, T* memory);
  void (*adjoint_first)(const MlpSolve<T>&, const MlpAdjointAttempt<T>&, int64_t tile, T* memory);
  void (*adjoint_trial)(const MlpSolve<T>&, const MlpAdjointAttempt<T>&, int64_t tile, T* memory);
  void (*adjoint_attempt)(const MlpSolve<T>&, const MlpAdjointAttempt<T>&, int64_t tile, T* memory);
};

// One evaluation of the field. Functions of a tile take memory for field_numbers().
template <typename T>
struct CpuMlpField {
  void (*forward)(const MlpSolve<T>&, const MlpFieldInputs<T>&, const MlpFieldForward<T>&,
                  int64_t tile, T* memory);
  void (*reverse)(const MlpSolve<T>&, const MlpFieldInputs<T>&, const MlpFieldReverse<T>&,
                  int64_t tile, T* memory);
  void (*vjp)(const MlpSolve<T>&, const MlpFieldInputs<T>&, const MlpFieldVjp<T>&, int64_t tile,
              T* memory);
};

template <typename T>
struct CpuMlpTable {
  int lanes;  // samples of a vector
  // Sizes of what the other functions are given.
  int64_t (*kept_numbers)(const MlpSolve<T>&);  // of a tile and stage
  int64_t (*workspace_numbers)(const MlpSolve<T>&);
  // Layers at a time.
  int64_t (*timed_numbers)(const MlpSolve<T>&);
  void (*time_layers)(const MlpSolve<T>&, const T* tau, const T* rate, T* numbers,
                      TimedLayer<T>* timed);
  // The closed form at a time.
  int64_t (*mixed_numbers)(const MlpSolve<T>&);
  int64_t (*mixing_numbers)(const MlpSolve<T>&);
  void (*mix)(const MlpSolve<T>&, const T* gate, T* unmixed, T* mixed, T* scratch);
  T (*unmix)(const MlpSolve<T>&, const MlpAt<T>&, T* mixed_bar, const LayerGradient<T>*,
             T* scratch);
  CpuMlpSteps<T> shared;  // one time and step for all samples
  CpuMlpSteps<T> own;     // each sample its own
  void (*adjoint_quadrature)(const MlpSolve<T>&, const MlpAdjointAttempt<T>&, const T* own_steps,
                             int64_t tile, T* memory);
  int64_t (*field_numbers)(const MlpSolve<T>&, int64_t cotangents);
  CpuMlpField<T> shared_field;  // one time for all samples
  CpuMlpField<T> own_field;     // each sample its own
};

struct CpuMlpKernels {
  CpuMlpTable<float> f32;
  CpuMlpTable<double> f64;
};

// One per object library; see kernels_isa.cpp and mlp_isa.cpp. Only the baseline exists off x86.
namespace cpu_baseline {
extern const CpuKernels kKernels;
extern const CpuMlpKernels kMlpKernels;
}  // namespace cpu_baseline
namespace cpu_avx2 {
extern const CpuKernels kKernels;
extern const CpuMlpKernels kMlpKernels;
}  // namespace cpu_avx2
namespace cpu_avx512 {
extern const CpuKernels kKernels;
extern const CpuMlpKernels kMlpKernels;
}  // namespace cpu_avx512

}  // namespace pycnf
