// Steps that the device chooses: control between attempts, and what follows an accepted one.

#include "core/attempt.h"
#include "core/interpolant.h"
#include "cuda/kernels.h"
#include "cuda/rk_rows.cuh"

namespace pycnf {
namespace {

template <typename Time, typename State>
__global__ void __launch_bounds__(kWarp)
    control_kernel(const __grid_constant__ AttemptPlan<State> plan, Moment moment,
                   const double* norms) {  // [2] or null
  if (threadIdx.x == 0) control_attempt<Time>(moment, plan, norms);
}

template <typename T>
struct AdvanceArguments {
  const Attempt* attempt;
  const double* outputs;
  T* y;               // [N]
  const T* y1;        // [N]
  T* first_row;       // [N]
  const T* last_row;  // [N]
  PackedRows<T, 1> middle;
  const T* h;
  T* solution;  // [outputs, N]
  int64_t size;
};

template <typename Time, typename T, int kWidth>
__global__ void __launch_bounds__(kThreads)
    advance_kernel(const __grid_constant__ AdvanceArguments<T> p) {
  const Attempt& attempt = *p.attempt;
  if (attempt.accepted_now == 0) return;
  const int64_t first = int64_t(attempt.first_output), last = int64_t(attempt.last_output);
  for_each_group<kWidth>(0, p.size, global_thread(), global_threads(), [&](auto width, int64_t i) {
    constexpr int w = decltype(width)::value;
    const Group<T, w> y1 = load<w>(p.y1 + i);
    const Group<T, w> f1 = load<w>(p.last_row + i);
    if (first < last) {
      const T h = *p.h;
      const Group<T, w> y0 = load<w>(p.y + i);
      const Group<T, w> f0 = load<w>(p.first_row + i);
      const Group<T, w> middle = advance<w>(p.y, p.middle, i);
      Quartic<T> quartic[w];
#pragma unroll
      for (int e = 0; e < w; ++e) {
        quartic[e] =
            fit_quartic(y0.value[e], y1.value[e], middle.value[e], f0.value[e], f1.value[e], h);
      }
      // Unrolled, and with h kept from before, it spills.
#pragma unroll 1
      for (int64_t output = first; output < last; ++output) {
        const T x = step_point<Time, T>(attempt, p.outputs[output]);
        Group<T, w> out;
#pragma unroll
        for (int e = 0; e < w; ++e) out.value[e] = evaluate_quartic(quartic[e], x);
        store<w>(p.solution + output * p.size + i, out);
      }
    }
    store<w>(p.y + i, y1);
    store<w>(p.first_row + i, f1);
  });
}

}  // namespace

template <typename Time, typename State>
cudaError_t launch_control(Moment moment, const AttemptPlan<State>& plan, const double* norms,
                           cudaStream_t stream) {
  return launch(control_kernel<Time, State>, 1, kWarp, 0, stream, plan, moment, norms);
}

template <typename Time, typename T>
cudaError_t launch_advance(const AdvanceParams<T>& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  const AdvanceArguments<T> arguments = {
      p.attempt,
      p.outputs,
      p.y,
      p.y1,
      p.first_row,
      p.last_row,
      pack_rows<T, 1>({&p.middle}, nullptr, nullptr),
      p.h,
      p.solution,
      p.size,
  };
  const bool wide = aligned({p.y, p.y1, p.first_row, p.last_row, p.solution}) &&
                    aligned(arguments.middle) && p.size % kFull<T> == 0;
  const int width = wide ? kFull<T> : 1;
  const auto kernel = wide ? advance_kernel<Time, T, kFull<T>> : advance_kernel<Time, T, 1>;
  return launch(kernel, blocks_for(p.size, int64_t(kThreads) * width), kThreads, 0, stream,
                arguments);
}

template cudaError_t launch_control<double>(Moment, const AttemptPlan<float>&, const double*,
                                            cudaStream_t);
template cudaError_t launch_control<double>(Moment, const AttemptPlan<double>&, const double*,
                                            cudaStream_t);
template cudaError_t launch_control<float>(Moment, const AttemptPlan<float>&, const double*,
                                           cudaStream_t);
template cudaError_t launch_advance<double>(const AdvanceParams<float>&, cudaStream_t);
template cudaError_t launch_advance<double>(const AdvanceParams<double>&, cudaStream_t);
template cudaError_t launch_advance<float>(const AdvanceParams<float>&, cudaStream_t);

}  // namespace pycnf
