// Interpolation over a step at many times.

#include "core/interpolant.h"
#include "cuda/kernels.h"
#include "cuda/rk_rows.cuh"

namespace pycnf {
namespace {

// Points of one launch. They travel as an argument: a copy from the host's memory would have to
// wait for it.
constexpr int kTimesPerLaunch = 128;

template <typename Storage, typename T>
struct InterpolateArguments {
  const Storage* y0;  // [N]
  const Storage* y1;  // [N]
  const Storage* f0;  // [N]
  const Storage* f1;  // [N]
  PackedRows<Storage, 1, T> middle;
  T h;
  T x[kTimesPerLaunch];
  int times;
  Storage* out;  // [times, N]
  int64_t size;
};

template <typename Storage, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    interpolate_kernel(const __grid_constant__ InterpolateArguments<Storage, T> p) {
  for_each_group<kWidth>(0, p.size, global_thread(), global_threads(), [&](auto width, int64_t i) {
    constexpr int w = decltype(width)::value;
    const Group<T, w> y0 = load<w>(p.y0 + i);
    const Group<T, w> y1 = load<w>(p.y1 + i);
    const Group<T, w> f0 = load<w>(p.f0 + i);
    const Group<T, w> f1 = load<w>(p.f1 + i);
    const Group<T, w> middle = advance<w>(p.y0, p.middle, i);
    Quartic<T> quartic[w];
#pragma unroll
    for (int e = 0; e < w; ++e) {
      quartic[e] =
          fit_quartic(y0.value[e], y1.value[e], middle.value[e], f0.value[e], f1.value[e], p.h);
    }
    for (int time = 0; time < p.times; ++time) {
      Group<T, w> out;
#pragma unroll
      for (int e = 0; e < w; ++e) out.value[e] = evaluate_quartic(quartic[e], p.x[time]);
      store<w>(p.out + time * p.size + i, out);
    }
  });
}

}  // namespace

template <typename Storage, typename T>
cudaError_t launch_interpolate(const InterpolateParams<Storage, T>& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  InterpolateArguments<Storage, T> arguments = {};
  arguments.y0 = p.y0;
  arguments.y1 = p.y1;
  arguments.f0 = p.f0;
  arguments.f1 = p.f1;
  arguments.middle = pack_rows<Storage, 1, T>({&p.middle}, nullptr, nullptr);
  arguments.h = p.h;
  arguments.size = p.size;
  const bool wide = aligned({p.y0, p.y1, p.f0, p.f1, p.out}) && aligned(arguments.middle) &&
                    (p.times == 1 || aligned({p.out + p.size}));
  const int width = wide ? kFull<Storage> : 1;
  const auto kernel =
      wide ? interpolate_kernel<Storage, T, kFull<Storage>> : interpolate_kernel<Storage, T, 1>;
  for (int64_t at = 0; at < p.times; at += kTimesPerLaunch) {
    arguments.times = int(p.times - at < kTimesPerLaunch ? p.times - at : kTimesPerLaunch);
    for (int i = 0; i < arguments.times; ++i) arguments.x[i] = p.x[at + i];
    arguments.out = p.out + at * p.size;
    const auto error =
        launch(kernel, blocks_for(p.size, kThreads * width), kThreads, 0, stream, arguments);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

template cudaError_t launch_interpolate(const InterpolateParams<float>&, cudaStream_t);
template cudaError_t launch_interpolate(const InterpolateParams<double>&, cudaStream_t);
template cudaError_t launch_interpolate(const InterpolateParams<__half, float>&, cudaStream_t);
template cudaError_t launch_interpolate(const InterpolateParams<__nv_bfloat16, float>&,
                                        cudaStream_t);

}  // namespace pycnf
