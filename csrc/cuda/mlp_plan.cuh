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

// The largest tiles that fit into shared memory and of which every multiprocessor gets one; where
// there are fewer samples than that, the smallest. layout_of(samples, most) may be a layout of more
// than `most` numbers, which does not fit.
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
  for (int samples = kMostSamples; samples >= kLeastSamples; samples /= 2) {
    const int most = most_shared / int(sizeof(T)) - before;
    const TileLayout layout = layout_of(samples, most);
    if (layout.numbers > most) continue;
    plan->layout = layout;
    plan->tiles = (batch + samples - 1) / samples;
    plan->shared_bytes = size_t(before + layout.numbers) * sizeof(T);
    if (plan->tiles >= processors) break;
  }
  if (plan->tiles == 0) return cudaSuccess;
  plan->threads = plan->layout.samples <= 16 ? kTileThreads / 2 : kTileThreads;
  const auto attribute = cudaFuncAttributeMaxDynamicSharedMemorySize;
  error = cudaFuncSetAttribute(kernel, attribute, int(plan->shared_bytes));
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
