// Kernels that are right or wrong on purpose: what the stand-in must run and what it must catch.

#include <cooperative_groups.h>

#include "cuda/device.cuh"

namespace {

using pycnf::barrier;
using pycnf::launch;
using pycnf::shared_memory;

constexpr int kBlocks = 5, kThreads = 96;

// What goes wrong, if anything.
enum Fault {
  kNone,
  kNoBarrier,
  kBarrierOfSome,
  kShuffleOfSome,
  kReadsFromOutside,
  kUnwritten,
  kBehind,
  kBefore,
  kNotAligned
};

// out[i] = the number of the next thread of the block, times 2.
__global__ void next_thread_kernel(int fault, double* out) {
  double* shared = shared_memory<double>();
  const int thread = int(threadIdx.x), next = (thread + 1) % kThreads;
  if (fault != kUnwritten || thread != 7) shared[thread] = thread;
  if (fault == kBehind && thread == 3) shared[kThreads] = 1.;
  if (fault == kBefore && thread == 3) shared[-1] = 1.;
  if (fault == kNotAligned && thread == 3) pycnf::store<2>(shared + 3, {3., 4.});
  if (fault == kBarrierOfSome && thread == 40) return;
  if (fault != kNoBarrier) barrier();
  double value = shared[next];
  if (fault != kShuffleOfSome || thread % 32 != 11) {
    const unsigned mask = fault == kReadsFromOutside ? 1u << thread % 32 : 0xffffffffu;
    value += __shfl_xor_sync(mask, __shfl_xor_sync(mask, value, 3), 3);
  }
  out[pycnf::global_thread()] = value;
}

// The order in which threads come.
__global__ void order_kernel(int* count, int* order) {
  order[atomicAdd(count, 1)] = int(pycnf::global_thread());
}

// Every exchange of a warp, an output of 32 numbers for each.
__global__ void exchange_kernel(int* out) {
  constexpr unsigned kAll = 0xffffffffu, kOdd = 0xaaaaaaaau;
  const int lane = int(threadIdx.x);
  int* at = out + lane;
  const auto put = [&](int value) {
    *at = value;
    at += 32;
  };
  put(__shfl_sync(kAll, lane, 5));
  put(__shfl_sync(kAll, lane, lane + 9, 8));
  put(__shfl_down_sync(kAll, lane, 3));
  put(__shfl_down_sync(kAll, lane, 3, 8));
  put(__shfl_up_sync(kAll, lane, 3));
  put(__shfl_up_sync(kAll, lane, 3, 8));
  put(__shfl_xor_sync(kAll, lane, 5));
  put(__shfl_xor_sync(kAll, lane, 9, 8));
  put(int(__ballot_sync(kAll, lane % 3 == 0)));
  put(__any_sync(kAll, lane == 31));
  put(__all_sync(kAll, lane != 31));
  int odd = -1;
  if (lane % 2 == 1) odd = __shfl_down_sync(kOdd, lane, 2);  // the last one's: its own
  __syncwarp();
  put(odd);
}

enum Together { kTogether, kNoGridBarrier, kGridBarrierOfSome, kNotCooperative, kSpins, kStuck };

// out[b] = the sum of what all blocks wrote before the barrier: a number's square, times 2.
__global__ void grid_kernel(int how, int* counter, double* squares, double* out) {
  const int block = int(blockIdx.x), blocks = int(gridDim.x);
  if (threadIdx.x == 0) squares[block] = 2. * block * block;
  if (how == kGridBarrierOfSome && block == 2 && threadIdx.x >= 32) return;
  if (how == kSpins || how == kStuck) {
    barrier();
    if (threadIdx.x == 0) {
      __threadfence();
      atomicAdd(counter, 1);
      const int all = how == kStuck ? blocks + 1 : blocks;
      while (atomicAdd(counter, 0) < all) __nanosleep(100);
    }
    barrier();
  } else if (how != kNoGridBarrier) {
    cooperative_groups::this_grid().sync();
  }
  if (threadIdx.x != unsigned(block)) return;
  double sum = 0.;
  for (int other = 0; other < blocks; ++other) sum += squares[other];
  out[block] = sum;
}

__global__ void empty_kernel() {}

// Blocks that stay and go through more tiles than they are: sums[tile] = the sum of the tile's
// `width` numbers, which a block holds in shared memory, and taken[tile] = the block that had it;
// then, behind the grid's barrier, out[block] = the sum of all sums.
__global__ void tiles_kernel(int tiles, int width, const double* numbers, double* sums, int* taken,
                             double* out) {
  double* tile_numbers = shared_memory<double>();
  const int threads = int(blockDim.x);
  for (int tile = int(blockIdx.x); tile < tiles; tile += int(gridDim.x)) {
    barrier();  // the tile before has been summed
    for (int i = int(threadIdx.x); i < width; i += threads) {
      tile_numbers[i] = numbers[int64_t(tile) * width + i];
    }
    barrier();
    if (threadIdx.x != 0) continue;
    double sum = 0.;
    for (int i = 0; i < width; ++i) sum += tile_numbers[i];
    sums[tile] = sum;
    taken[tile] = int(blockIdx.x);
  }
  cooperative_groups::this_grid().sync();
  if (threadIdx.x != 0) return;
  double sum = 0.;
  for (int tile = 0; tile < tiles; ++tile) sum += sums[tile];
  out[blockIdx.x] = sum;
}

}  // namespace

extern "C" {

cudaError_t check_next_thread(int fault, double* out) {
  return launch(next_thread_kernel, kBlocks, kThreads, kThreads * sizeof(double), nullptr, fault,
                out);
}

cudaError_t check_order(int* count, int* order) {
  return launch(order_kernel, kBlocks, kThreads, 0, nullptr, count, order);
}

cudaError_t check_exchanges(int* out) { return launch(exchange_kernel, 1, 32, 0, nullptr, out); }

cudaError_t check_grid(int how, int blocks, int* counter, double* squares, double* out) {
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = how != kNotCooperative;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(64);
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, grid_kernel, how, counter, squares, out);
}

// As many blocks as run together, told in *blocks. A kernel keeps what it has asked for, hence
// `asks_for`, of which no launch needs more.
cudaError_t check_tiles(int tiles, int width, int threads, int64_t asks_for, const double* numbers,
                        double* sums, int* taken, double* out, int* blocks) {
  auto failure = cudaFuncSetAttribute(tiles_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                      int(asks_for));
  if (failure != cudaSuccess) return failure;
  const size_t shared_bytes = size_t(width) * sizeof(double);
  int device = -1, processors = 0, held = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  failure =
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&held, tiles_kernel, threads, shared_bytes);
  if (failure != cudaSuccess) return failure;
  *blocks = held * processors;
  cudaLaunchAttribute together = {};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  // One block where not even one fits: the launch is to be refused.
  config.gridDim = dim3(unsigned(*blocks > 0 ? *blocks : 1));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, tiles_kernel, tiles, width, numbers, sums, taken, out);
}

cudaError_t check_attribute(cudaDeviceAttr attribute, int device, int* value) {
  return cudaDeviceGetAttribute(value, attribute, device);
}

cudaError_t check_launch(int64_t blocks, int threads, size_t shared_bytes) {
  return launch(empty_kernel, blocks, threads, shared_bytes, nullptr);
}

}  // extern "C"
