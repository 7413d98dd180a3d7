// How a launch over tiles of samples fits on the device at hand.
#pragma once

#include "cuda/device.cuh"
#include "cuda/mlp_solve.h"

namespace pycnf {

constexpr int kTileThreads = 256;
constexpr int kMostSamples = 64, kLeastSamples = 8;

// Numbers that hold what stands before those of TileLayout.
template <typename Control, typename T>
constexpr int kControlNumbers = int((sizeof(Control) + 15) / 16 * 16 / sizeof(T));

// What a tile costs besides its samples, in samples: weights are read once for all of them.
constexpr int64_t kTileCost = 8;

// The tiles that fit into shared memory and leave the multiprocessor that has most of them the least
// to do. layout_of(samples, most) may be a layout of more than `most` numbers, which does not fit.
template <typename T, typename Kernel, typename LayoutOf>
cudaError_t plan_tiles(Kernel* kernel, int64_t batch, int before, const LayoutOf& layout_of,
                       TilePlan* plan) {
  *plan = {};
  int device = 0, processors = 0, most_shared = 0;
  const auto query = [&](int* value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, device);
  };
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = query(&processors, cudaDevAttrMultiProcessorCount);
  if (error == cudaSuccess) error = query(&most_shared, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (error != cudaSuccess) return error;
  int64_t least_cost = 0;
  for (int samples = kMostSamples; samples >= kLeastSamples; samples /= 2) {
    const int most = most_shared / int(sizeof(T)) - before;
    const TileLayout layout = layout_of(samples, most);
    const int64_t tiles = (batch + samples - 1) / samples;
    const int64_t cost = (tiles + processors - 1) / processors * (samples + kTileCost);
    if (layout.numbers > most || (plan->tiles > 0 && cost >= least_cost)) continue;
    least_cost = cost;
    plan->layout = layout;
    plan->tiles = tiles;
    plan->shared_bytes = size_t(before + layout.numbers) * sizeof(T);
  }
  if (plan->tiles == 0) return cudaSuccess;
  plan->threads = plan->layout.samples <= 16 ? kTileThreads / 2 : kTileThreads;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  // Always the same, for launches of other sizes may be under way.
  error = cudaFuncSetAttribute(kernel, attribute, most_shared);
  int resident = 0;
  if (error == cudaSuccess) {
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, plan->threads,
                                                          plan->shared_bytes);
  }
  const int64_t most = int64_t(resident) * processors;
  plan->blocks = plan->tiles < most ? plan->tiles : most;
  return error;
}

}  // namespace pycnf
