// Stage combination.

#include "cuda/kernels.h"
#include "cuda/rk_rows.cuh"

namespace pycnf {
namespace {

template <typename Storage, typename T>
struct StageArguments {
  const Storage* y0;  // [N]
  PackedRows<Storage, 1, T> terms;
  const Storage* fresh;  // [N] or null
  Storage* fresh_row;    // [N]
  Storage* out;          // [N]
  int64_t size;
};

template <typename Storage, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    stage_kernel(const __grid_constant__ StageArguments<Storage, T> p) {
  for_each_group<kWidth>(0, p.size, global_thread(), global_threads(), [&](auto width, int64_t i) {
    constexpr int w = decltype(width)::value;
    store<w>(p.out + i, advance<w>(p.y0, p.terms, i));
    store_fresh<w>(p.fresh, p.fresh_row, i);
  });
}

}  // namespace

template <typename Storage, typename T>
cudaError_t launch_stage(const StageParams<Storage, T>& p, int64_t size, cudaStream_t stream) {
  if (size == 0) return cudaSuccess;
  const auto terms = pack_rows<Storage, 1, T>({&p.terms}, p.fresh, p.fresh_row);
  const StageArguments<Storage, T> arguments = {p.y0, terms, p.fresh, p.fresh_row, p.out, size};
  if (aligned({p.y0, p.fresh, p.fresh ? p.fresh_row : nullptr, p.out}) &&
      aligned(arguments.terms)) {
    constexpr int kWidth = kFull<Storage>;
    return launch(stage_kernel<Storage, T, kWidth>, blocks_for(size, kThreads * kWidth), kThreads,
                  0, stream, arguments);
  }
  return launch(stage_kernel<Storage, T, 1>, blocks_for(size, kThreads), kThreads, 0, stream,
                arguments);
}

template cudaError_t launch_stage(const StageParams<float>&, int64_t, cudaStream_t);
template cudaError_t launch_stage(const StageParams<double>&, int64_t, cudaStream_t);
template cudaError_t launch_stage(const StageParams<__half, float>&, int64_t, cudaStream_t);
template cudaError_t launch_stage(const StageParams<__nv_bfloat16, float>&, int64_t, cudaStream_t);

}  // namespace pycnf
