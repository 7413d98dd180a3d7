// Stage combination.

#include "cuda/kernels.h"
#include "cuda/rk_rows.cuh"

namespace pycnf {
namespace {

template <typename T>
struct StageArguments {
  const T* y0;  // [N]
  PackedRows<T, 1> terms;
  const T* fresh;  // [N] or null
  T* fresh_row;    // [N]
  T* out;          // [N]
  int64_t size;
};

template <typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const __grid_constant__ StageArguments<T> p) {
  for_each_group<kWidth>(0, p.size, global_thread(), global_threads(), [&](auto width, int64_t i) {
    constexpr int w = decltype(width)::value;
    store<w>(p.out + i, advance<w>(p.y0, p.terms, i));
    store_fresh<w>(p.fresh, p.fresh_row, i);
  });
}

}  // namespace

template <typename T>
cudaError_t launch_stage(const StageParams<T>& p, int64_t size, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  const StageArguments<T> arguments = {
      p.y0, pack_rows<T, 1>({&p.terms}, p.fresh, p.fresh_row), p.fresh, p.fresh_row, p.out, size};
  if (aligned({p.y0, p.fresh, p.fresh ? p.fresh_row : nullptr, p.out}) &&
      aligned(arguments.terms)) {
    return launch(stage_kernel<T, kFull<T>>, blocks_for(size, kThreads * kFull<T>), kThreads, 0,
                  stream, arguments);
  }
  return launch(stage_kernel<T, 1>, blocks_for(size, kThreads), kThreads, 0, stream, arguments);
}

template cudaError_t launch_stage(const StageParams<float>&, int64_t, cudaStream_t);
template cudaError_t launch_stage(const StageParams<double>&, int64_t, cudaStream_t);

}  // namespace pycnf
