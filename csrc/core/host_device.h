// What lets one header serve g++ (once per instruction set) and nvcc.
#pragma once

#include <cstdint>

// Formulas have internal linkage: every object keeps the copy compiled for its own instruction set.
#if defined(__CUDACC__)
#define PYCNF_HD static inline __host__ __device__
#else
#define PYCNF_HD static inline __attribute__((always_inline))
#endif
