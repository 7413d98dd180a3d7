// The kernel table of the instruction set that torch uses on this machine.
#pragma once

#include "cpu/kernels.h"

namespace pycnf {

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

}  // namespace pycnf
