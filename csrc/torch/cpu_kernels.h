// The kernel table of the instruction set that torch uses on this machine.
#pragma once

#include "cpu/kernels.h"

namespace pycnf {

// Elements per thread below which waking another thread costs more than it saves.
constexpr int64_t kGrain = 32768;

const CpuKernels& cpu_kernels_of_this_machine();

template <typename T>
const CpuKernelTable<T>& cpu_kernels();

template <>
inline const CpuKernelTable<float>& cpu_kernels<float>() {
  return cpu_kernels_of_this_machine().f32;
}

template <>
inline const CpuKernelTable<double>& cpu_kernels<double>() {
  return cpu_kernels_of_this_machine().f64;
}

const CpuMlpKernels& cpu_mlp_kernels_of_this_machine();

template <typename T>
const CpuMlpTable<T>& cpu_mlp_kernels();

template <>
inline const CpuMlpTable<float>& cpu_mlp_kernels<float>() {
  return cpu_mlp_kernels_of_this_machine().f32;
}

template <>
inline const CpuMlpTable<double>& cpu_mlp_kernels<double>() {
  return cpu_mlp_kernels_of_this_machine().f64;
}

}  // namespace pycnf
