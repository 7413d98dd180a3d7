// Norms for the choice of the first step.

#include "core/rk.h"
#include "cuda/kernels.h"
#include "cuda/norm.cuh"
#include "cuda/tolerance.cuh"

namespace pycnf {
namespace {

template <typename Storage, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    initial_kernel(const __grid_constant__ InitialParams<Storage, T> p,
                   const __grid_constant__ NormLayout layout,
                   NormPartial* partials) {  // [ranges]
  const Tolerance<T> tolerance = resolved(p.tolerance);
  for (int range = int(blockIdx.x); range < layout.ranges; range += int(gridDim.x)) {
    NormPartial partial = {{0., 0.}, 0};
    const auto body = [&](auto width, int64_t i) {
      constexpr int w = decltype(width)::value;
      const Group<Storage, w> y0 = fetch<w>(p.y0 + i);
      const Group<Storage, w> f0 = fetch<w>(p.f0 + i);
      Group<T, w> value[2] = {widened(y0), widened(f0)};
      if (p.f1 != nullptr) {
        const Group<T, w> f1 = load<w>(p.f1 + i);
#pragma unroll
        for (int e = 0; e < w; ++e) {
          value[0].value[e] = value[1].value[e] = f1.value[e] - widened(f0.value[e]);
        }
      }
#pragma unroll
      for (int which = 0; which < 2; ++which) {
#pragma unroll
        for (int e = 0; e < w; ++e) {
          const T ratio =
              scaled(value[which].value[e], magnitude(widened(y0.value[e])), tolerance, i + e);
          partial.sum_squares[which] += double(ratio) * double(ratio);
        }
      }
    };
    const ElementRange elements = elements_of(layout, range);
    for_each_group<kWidth>(elements.begin, elements.end, threadIdx.x, kThreads, body);
    partial = block_sum(partial);
    if (threadIdx.x == 0) partials[range] = partial;
  }
}

}  // namespace

template <typename Storage, typename T>
cudaError_t launch_initial(const InitialParams<Storage, T>& p, const NormLayout& layout,
                           NormPartial* partials, double* result, cudaStream_t stream) {
  if (layout.ranges > 0) {
    const bool wide = aligned({p.y0, p.f0, p.f1});
    const auto kernel =
        wide ? initial_kernel<Storage, T, kFull<Storage>> : initial_kernel<Storage, T, 1>;
    const auto error = launch(kernel, blocks_for(layout.ranges, 1), kThreads,
                              block_sum_bytes(kThreads), stream, p, layout, partials);
    if (error != cudaSuccess) return error;
  }
  return launch_reduce_norm(layout, partials, /*flag=*/false, result, stream);
}

template cudaError_t launch_initial(const InitialParams<float>&, const NormLayout&, NormPartial*,
                                    double*, cudaStream_t);
template cudaError_t launch_initial(const InitialParams<double>&, const NormLayout&, NormPartial*,
                                    double*, cudaStream_t);
template cudaError_t launch_initial(const InitialParams<__half, float>&, const NormLayout&,
                                    NormPartial*, double*, cudaStream_t);
template cudaError_t launch_initial(const InitialParams<__nv_bfloat16, float>&, const NormLayout&,
                                    NormPartial*, double*, cudaStream_t);

}  // namespace pycnf
