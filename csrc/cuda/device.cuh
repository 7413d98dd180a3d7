// The kernels' one door to CUDA's runtime and intrinsics: launch, barrier, warp exchange, shared
// memory, wide loads, numbers of 16 bits. Who runs the kernels as plain C++ on a host, as
// tests/cuda_host does, replaces CUDA's headers.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <type_traits>

namespace pycnf {

constexpr int kWarp = 32;
constexpr int kThreads = 256;  // of a block, unless a kernel says otherwise

// Enough blocks to keep every multiprocessor busy to the end (a GPU holds a thousand of ours at a
// time); what is left over is done by the same blocks in strides. A constant, so that no launch has
// to query the device.
constexpr int64_t kMaxBlocks = 16384;

inline int64_t blocks_for(int64_t work, int64_t per_block) {
  const int64_t blocks = (work + per_block - 1) / per_block;
  return blocks < kMaxBlocks ? blocks : kMaxBlocks;
}

// The error of this launch alone: cudaGetLastError() would also return, and clear, somebody else's.
template <typename... Params, typename... Arguments>
cudaError_t launch(void (*kernel)(Params...), int64_t blocks, int threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Blocks that all run at the same time, so that they can wait for each other.
template <typename... Params, typename... Arguments>
cudaError_t launch_together(void (*kernel)(Params...), int64_t blocks, int threads,
                            size_t shared_bytes, cudaStream_t stream,
                            const Arguments&... arguments) {
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

// Dynamic shared memory, the only kind in use.
template <typename T>
__device__ inline T* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char pycnf_shared[];
#else
  unsigned char* pycnf_shared = cuda_host::shared_memory();  // a host has no such storage
#endif
  return reinterpret_cast<T*>(pycnf_shared);
}

// The same pointer, which the compiler then knows to be one into shared memory: where a function was
// handed it, each access would look up which memory it is of.
template <typename T>
__device__ inline T* known_shared(T* at) {
  T* const first = shared_memory<T>();
  return first + int(at - first);
}

__device__ inline void barrier() { __syncthreads(); }

// Of all blocks of a launch_together().
__device__ inline void grid_barrier() { cooperative_groups::this_grid().sync(); }

// The value of the lane `offset` above; every lane of the warp takes part.
template <typename T>
__device__ inline T shuffle_down(T value, int offset) {
  return __shfl_down_sync(0xffffffffu, value, offset);
}

__device__ inline int64_t global_thread() { return int64_t(blockIdx.x) * blockDim.x + threadIdx.x; }

__device__ inline int64_t global_threads() { return int64_t(gridDim.x) * blockDim.x; }

// ---- storage and arithmetic ---------------------------------------------------------------------

// What numbers that are stored as Storage are computed in.
template <typename Storage>
using Arithmetic = std::conditional_t<sizeof(Storage) == 2, float, Storage>;

template <typename Storage>
__device__ inline Arithmetic<Storage> widened(Storage x) {
  if constexpr (std::is_same_v<Storage, __half>) {
    return __half2float(x);
  } else if constexpr (std::is_same_v<Storage, __nv_bfloat16>) {
    return __bfloat162float(x);
  } else {
    return x;
  }
}

// To the nearest number that can be stored, to infinity if none is near.
template <typename Storage>
__device__ inline Storage rounded(Arithmetic<Storage> x) {
  if constexpr (std::is_same_v<Storage, __half>) {
    return __float2half_rn(x);
  } else if constexpr (std::is_same_v<Storage, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

// Two of them as they lie in memory.
template <typename Storage>
__device__ inline uint32_t rounded_pair(float first, float second) {
  if constexpr (std::is_same_v<Storage, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// ---- tensor cores -------------------------------------------------------------------------------

__device__ inline void warp_barrier() { __syncwarp(); }

// An f32 with 10 bits behind the point, to the nearest, of two equally near away from zero.
__device__ inline uint32_t rounded_tf32(float x) {
#if defined(__CUDACC__)
  uint32_t bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return bits;
#else
  return cuda_host::rounded_tf32(x);
#endif
}

__device__ inline float float_of(uint32_t bits) { return reinterpret_cast<const float&>(bits); }

// sum [16, 8] += a [16, 8] b [8, 8] in TF32 by a warp, each lane with its parts of the three as
// mma.sync.m16n8k8 has them.
__device__ inline void multiply_add_tf32(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_host::multiply_add<1>(sum, a, b0, b1);
#endif
}

// sum [16, 8] += a [16, 16] b [16, 8] in bf16, two numbers a word; see mma.sync.m16n8k16.
__device__ inline void multiply_add_bf16(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
#if defined(__CUDACC__)
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  cuda_host::multiply_add<2>(sum, a, b0, b1);
#endif
}

// ---- groups of elements -------------------------------------------------------------------------

// Elements that a thread moves in one access: kFull of them (16 bytes) where every row is aligned,
// else one. Neighbouring threads own neighbouring groups, so that either way a warp's accesses are
// one run of memory.
template <typename T>
constexpr int kFull = int(16 / sizeof(T));

template <typename T, int kWidth>
struct alignas(kWidth * sizeof(T)) Group {
  T value[kWidth];
};

// As it is stored.
template <int kWidth, typename Storage>
__device__ inline Group<Storage, kWidth> fetch(const Storage* from) {
  return *reinterpret_cast<const Group<Storage, kWidth>*>(from);
}

template <typename Storage, int kWidth>
__device__ inline Group<Arithmetic<Storage>, kWidth> widened(const Group<Storage, kWidth>& group) {
  Group<Arithmetic<Storage>, kWidth> wide;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) wide.value[e] = widened(group.value[e]);
  return wide;
}

template <int kWidth, typename Storage>
__device__ inline Group<Arithmetic<Storage>, kWidth> load(const Storage* from) {
  return widened(fetch<kWidth>(from));
}

template <int kWidth, typename Storage>
__device__ inline void store(Storage* to, const Group<Storage, kWidth>& group) {
  *reinterpret_cast<Group<Storage, kWidth>*>(to) = group;
}

// In words of two numbers, which the compiler does not store one by one.
template <int kWidth, typename Storage>
  requires(sizeof(Storage) == 2)
__device__ inline void store(Storage* to, const Group<float, kWidth>& group) {
  if constexpr (kWidth == 1) {
    *to = rounded<Storage>(group.value[0]);
  } else {
    Group<uint32_t, kWidth / 2> words;
#pragma unroll
    for (int e = 0; e < kWidth; e += 2) {
      words.value[e / 2] = rounded_pair<Storage>(group.value[e], group.value[e + 1]);
    }
    *reinterpret_cast<Group<uint32_t, kWidth / 2>*>(to) = words;
  }
}

template <typename T, int kWidth>
__device__ inline Group<T, kWidth> filled(T value) {
  Group<T, kWidth> group;
#pragma unroll
  for (int e = 0; e < kWidth; ++e) group.value[e] = value;
  return group;
}

// Whether rows can be moved in groups of 16 bytes; null pointers can.
inline bool aligned(std::initializer_list<const void*> rows) {
  uintptr_t bits = 0;
  for (const void* row : rows) bits |= reinterpret_cast<uintptr_t>(row);
  return bits % 16 == 0;
}

template <int kWidth>
using Width = std::integral_constant<int, kWidth>;

// Calls body(Width<w>, i) for elements [i, i + w) until [begin, end) is covered, the work shared by
// `threads` threads (at least 2 kWidth). Groups begin at multiples of their width, counted from the
// start of the row; what [begin, end) cuts off at its edges is done one by one.
template <int kWidth, typename Body>
__device__ inline void for_each_group(int64_t begin, int64_t end, int64_t thread, int64_t threads,
                                      const Body& body) {
  const int64_t above = (begin + kWidth - 1) / kWidth * kWidth;
  const int64_t below = end / kWidth * kWidth;
  const int64_t first = above < end ? above : end;
  const int64_t last = below > first ? below : first;
  for (int64_t i = first + thread * kWidth; i < last; i += threads * kWidth) {
    body(Width<kWidth>(), i);
  }
  if constexpr (kWidth > 1) {
    const int64_t head = first - begin;
    if (thread < head + (end - last)) {
      body(Width<1>(), thread < head ? begin + thread : last + (thread - head));
    }
  }
}

}  // namespace pycnf
