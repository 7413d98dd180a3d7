// Stands in for CUDA's header of this name: numbers of 16 bits as the kernels store them.
#pragma once

#include <bit>
#include <cstdint>

struct __half {
  uint16_t bits;
};

struct __half2 {
  __half x, y;
};

inline float __half2float(__half x) { return float(std::bit_cast<_Float16>(x.bits)); }

inline __half __float2half_rn(float x) { return {std::bit_cast<uint16_t>(_Float16(x))}; }

inline __half2 __floats2half2_rn(float x, float y) {
  return {__float2half_rn(x), __float2half_rn(y)};
}
