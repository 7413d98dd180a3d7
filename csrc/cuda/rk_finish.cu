// End of a step: the newest row stored, solution, error estimate, scaled error and its norm, every
// row read once.

#include "cuda/kernels.h"
#include "cuda/norm.cuh"
#include "cuda/rk_rows.cuh"
#include "cuda/tolerance.cuh"

namespace pycnf {
namespace {

template <typename Storage, typename T>
struct FinishArguments {
  const Storage* y0;               // [N]
  PackedRows<Storage, 2, T> rows;  // sums: solution, error
  bool writes_solution;            // else y1 is read
  const Storage* fresh;            // [N] or null
  Storage* fresh_row;              // [N]
  Storage* y1;                     // [N]
  Storage* ratio;                  // [N] or null
  Tolerance<T> tolerance;
};

template <typename Storage, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ FinishArguments<Storage, T> p,
                  const __grid_constant__ NormLayout layout,
                  NormPartial* partials) {  // [ranges]
  const Tolerance<T> tolerance = resolved(p.tolerance);
  for (int range = int(blockIdx.x); range < layout.ranges; range += int(gridDim.x)) {
    NormPartial partial = {{0., 0.}, 0};
    const auto body = [&](auto width, int64_t i) {
      constexpr int w = decltype(width)::value;
      const Group<T, w> y0 = load<w>(p.y0 + i);
      Group<T, w> y1;
      if (!p.writes_solution) y1 = load<w>(p.y1 + i);
      Group<T, w> sums[2];
      weighted_sums(p.rows, i, sums);
      if (p.writes_solution) {
#pragma unroll
        for (int e = 0; e < w; ++e) {
          // What comes next is about the solution as it is stored, which may be infinite.
          y1.value[e] = widened(rounded<Storage>(y0.value[e] + sums[0].value[e]));
        }
        store<w>(p.y1 + i, y1);
      }
      store_fresh<w>(p.fresh, p.fresh_row, i);
      Group<T, w> ratio;
#pragma unroll
      for (int e = 0; e < w; ++e) {
        const T size = larger_magnitude(y0.value[e], y1.value[e]);
        ratio.value[e] = scaled(sums[1].value[e], size, tolerance, i + e);
        partial.sum_squares[0] += double(ratio.value[e]) * double(ratio.value[e]);
        partial.nonfinite += is_finite(y1.value[e]) ? 0 : 1;
      }
      if (p.ratio != nullptr) store<w>(p.ratio + i, ratio);
    };
    const ElementRange elements = elements_of(layout, range);
    for_each_group<kWidth>(elements.begin, elements.end, threadIdx.x, kThreads, body);
    partial = block_sum(partial);
    if (threadIdx.x == 0) partials[range] = partial;
  }
}

}  // namespace

template <typename Storage, typename T>
cudaError_t launch_finish(const FinishParams<Storage, T>& p, const NormLayout& layout,
                          NormPartial* partials, double* result, cudaStream_t stream) {
  const bool writes_solution = p.solution.count > 0;
  if (writes_solution && p.solution.count != p.error.count) return cudaErrorInvalidValue;
  // Without terms, the solution's weights are zero.
  WeightedRows<Storage, T> solution = p.error;
  for (int j = 0; j < p.error.count; ++j) {
    solution.weights[j] = writes_solution ? p.solution.weights[j] : T(0);
  }
  const FinishArguments<Storage, T> arguments = {
      p.y0,
      pack_rows<Storage, 2, T>({&solution, &p.error}, p.fresh, p.fresh_row),
      writes_solution,
      p.fresh,
      p.fresh_row,
      p.y1,
      p.ratio,
      p.tolerance,
  };
  const bool wide = aligned({p.y0, p.fresh, p.fresh ? p.fresh_row : nullptr, p.y1, p.ratio}) &&
                    aligned(arguments.rows);
  if (layout.ranges > 0) {
    const auto kernel =
        wide ? finish_kernel<Storage, T, kFull<Storage>> : finish_kernel<Storage, T, 1>;
    const auto error = launch(kernel, blocks_for(layout.ranges, 1), kThreads,
                              block_sum_bytes(kThreads), stream, arguments, layout, partials);
    if (error != cudaSuccess) return error;
  }
  return launch_reduce_norm(layout, partials, /*flag=*/true, result, stream);
}

template cudaError_t launch_finish(const FinishParams<float>&, const NormLayout&, NormPartial*,
                                   double*, cudaStream_t);
template cudaError_t launch_finish(const FinishParams<double>&, const NormLayout&, NormPartial*,
                                   double*, cudaStream_t);
template cudaError_t launch_finish(const FinishParams<__half, float>&, const NormLayout&,
                                   NormPartial*, double*, cudaStream_t);
template cudaError_t launch_finish(const FinishParams<__nv_bfloat16, float>&, const NormLayout&,
                                   NormPartial*, double*, cudaStream_t);

}  // namespace pycnf
