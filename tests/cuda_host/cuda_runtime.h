// Stands in for CUDA's header of this name, so that csrc/cuda compiles as plain C++ and runs where
// there is no GPU: with this folder first on the include path, g++ takes the .cu files as they are.
//
// A GPU's thread is a fiber on one OS thread. It runs until it waits: at a barrier, or where lanes
// of a warp exchange values. Who runs next is drawn from cuda_host_seed()'s seed, sometimes among
// all threads, sometimes one warp or block as far ahead of the others as it gets, so what a kernel
// leaves to chance differs between seeds. The blocks of a launch run one after the other in random
// order; those of a cooperative launch run together. A launch gives cudaErrorLaunchFailure, and
// cuda_host_error() tells why, where
//   - threads wait for others that have returned or wait elsewhere: a barrier, a grid barrier or an
//     exchange that not everybody reaches (GPUs forgive those that have returned);
//   - a lane reads from a lane that takes no part;
//   - an address is not a multiple of what is loaded or stored there at once;
//   - a block has written before or behind its dynamic shared memory. That memory begins as NaN, so
//     that a read of what nobody wrote shows in the result.
// What it cannot show: between two waits a thread is never interrupted, so a race shows only if the
// order of whole stretches matters; and there is only one memory, always coherent.
//
// To add a kernel: its .cu file in csrc/cuda is compiled as it is. Export a function that calls its
// launcher in entry.cpp, declare and wrap it in tests/host_kernels.py, and compare it, for several
// seeds, with the CPU's op or pycnf.reference in tests/test_cuda_host.py. Its op in csrc/torch runs
// on a host too, see tests/host_ops.py; then no function of C is needed. What the kernel needs of
// CUDA and this header lacks goes here, a few lines each. Grids, blocks and warps have one
// dimension. Static __shared__ arrays have no meaning here: csrc/cuda/device.cuh has the one way to
// shared memory. cooperative_groups.h beside this file has the grid's barrier.
//
// The device has the limits of an H100, but for a few multiprocessors only (4, or as many as
// cuda_host_multiprocessors() says), so that a kernel which keeps its blocks and goes through many
// tiles has more tiles than blocks in a small test. A block gets up to 48 KiB of shared memory, or
// 227 KiB after cudaFuncSetAttribute(); a launch beyond gives cudaErrorInvalidValue. A cooperative
// launch of more blocks than multiprocessors hold at once, which
// cudaOccupancyMaxActiveBlocksPerMultiprocessor() tells, gives cudaErrorCooperativeLaunchTooLarge.
#pragma once

#include <math.h>

#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>

#include "cuda_runtime_api.h"
#include "grid.h"

#define __global__
#define __device__
#define __host__
#define __grid_constant__
#define __launch_bounds__(...)
#define __noinline__ __attribute__((noinline))

static const uint3& threadIdx = cuda_host::thread_index;
static const uint3& blockIdx = cuda_host::block_index;
static const dim3& blockDim = cuda_host::block_size;
static const dim3& gridDim = cuda_host::grid_size;

// Like CUDA's, copies the arguments once at the launch, and gives every thread its own.
template <typename... Params, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...),
                               Arguments&&... arguments) {
  const std::tuple<Params...> copies(arguments...);
  return cuda_host::run(*config, reinterpret_cast<const void*>(kernel),
                        [&] { std::apply(kernel, copies); });
}

// ---- barriers -----------------------------------------------------------------------------------

inline void __syncthreads() { cuda_host::wait_for_block(); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { cuda_host::vote(mask, false); }

inline void __threadfence() {}

// For those who wait in a loop for what another block writes; only in a cooperative launch.
inline void __nanosleep(unsigned) { cuda_host::nap(); }

// ---- exchanges in a warp ------------------------------------------------------------------------

namespace cuda_host {

template <typename T>
T value_of_lane(unsigned mask, T value, int lane) {
  static_assert(std::is_arithmetic_v<T> && sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, lane);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

inline int lane() { return int(threadIdx.x % 32); }

}  // namespace cuda_host

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int first = cuda_host::lane() / width * width;
  return cuda_host::value_of_lane(mask, value, first + (source & (width - 1)));
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = cuda_host::lane(), source = lane + int(offset);
  return cuda_host::value_of_lane(mask, value, source / width == lane / width ? source : lane);
}

template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  const int lane = cuda_host::lane(), source = lane - int(offset);
  return cuda_host::value_of_lane(mask, value, source >= lane / width * width ? source : lane);
}

// Unlike the others', the source may be in a part of the warp before one's own.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = cuda_host::lane(), source = lane ^ bits;
  return cuda_host::value_of_lane(mask, value, source / width <= lane / width ? source : lane);
}

inline unsigned __ballot_sync(unsigned mask, int value) {
  return cuda_host::vote(mask, value != 0);
}

inline int __any_sync(unsigned mask, int value) { return __ballot_sync(mask, value) != 0; }

inline int __all_sync(unsigned mask, int value) { return __ballot_sync(mask, value) == mask; }

// ---- tensor cores -------------------------------------------------------------------------------

namespace cuda_host {

// As cvt.rna.tf32.f32; what is not finite stays as it is.
inline uint32_t rounded_tf32(float x) {
  uint32_t bits = 0;
  std::memcpy(&bits, &x, sizeof(bits));
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & ~0x1fffu;
}

// The e-th of the numbers that a word holds: one of TF32, whose last 13 bits a GPU does not read, or
// two of bf16.
template <int kInWord>
float number_of_word(uint32_t word, int e) {
  if (kInWord == 1) {
    word &= ~0x1fffu;
  } else {
    word = e == 0 ? word << 16 : word & 0xffff0000u;
  }
  float number = 0;
  std::memcpy(&number, &word, sizeof(number));
  return number;
}

// mma.sync's m16n8k8 for TF32 and m16n8k16 for bf16: a lane's words are numbers of rows g, g + 8 of
// the first matrix and of column g of the second, its sums of rows g, g + 8 and columns 2 t, 2 t + 1.
// The lanes with the same g have a row's numbers among them.
template <int kInWord>
void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const int g = lane() / 4, t = lane() % 4;
  const auto two = [](uint32_t first, uint32_t second) { return uint64_t(second) << 32 | first; };
  const auto word = [](uint64_t pair, int i) { return uint32_t(pair >> 32 * i); };
  for (int other = 0; other < 4; ++other) {
    uint64_t of_row[2], of_column[2];  // [half of the terms], [column]
    for (int half = 0; half < 2; ++half) {
      of_row[half] = __shfl_sync(0xffffffffu, two(a[2 * half], a[2 * half + 1]), 4 * g + other);
    }
    for (int c = 0; c < 2; ++c) {
      of_column[c] = __shfl_sync(0xffffffffu, two(b0, b1), 4 * (2 * t + c) + other);
    }
    for (int half = 0; half < 2; ++half) {
      for (int e = 0; e < kInWord; ++e) {
        for (int r = 0; r < 2; ++r) {
          for (int c = 0; c < 2; ++c) {
            sum[2 * r + c] += number_of_word<kInWord>(word(of_row[half], r), e) *
                              number_of_word<kInWord>(word(of_column[c], half), e);
          }
        }
      }
    }
  }
}

}  // namespace cuda_host

// ---- atomics: nobody interrupts -----------------------------------------------------------------

template <typename T>
T atomicExch(T* at, T value) {
  const T before = *at;
  *at = value;
  return before;
}

template <typename T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
  return atomicExch(at, T(*at + value));
}

template <typename T>
T atomicMax(T* at, std::type_identity_t<T> value) {
  return atomicExch(at, *at < value ? value : *at);
}

template <typename T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return atomicExch(at, *at == expected ? value : *at);
}
