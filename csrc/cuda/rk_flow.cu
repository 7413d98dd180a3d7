// The flows' steps that the device chooses: control between attempts, and what follows an accepted
// one.

#include "core/flow_attempt.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace pycnf {
namespace {

template <typename State>
__global__ void __launch_bounds__(kWarp)
    flow_control_kernel(const __grid_constant__ FlowPlan<State> plan, FlowMoment moment,
                        const double* norms) {  // [2] or null
  if (threadIdx.x == 0) control_flow(moment, plan, norms);
}

template <typename State, int kWidth>
__global__ void __launch_bounds__(kThreads)
    flow_advance_kernel(const __grid_constant__ FlowAdvanceParams<State> p) {
  if (p.attempt->accepted_now == 0) return;
  State* tape = p.tape;
  if (tape != nullptr) tape += (int64_t(p.attempt->accepted) - 1) * p.kept;
  for_each_group<kWidth>(0, p.size, global_thread(), global_threads(), [&](auto width, int64_t i) {
    constexpr int w = decltype(width)::value;
    if (tape != nullptr && i < p.kept) store<w>(tape + i, load<w>(p.y + i));
    store<w>(p.y + i, load<w>(p.y1 + i));
    store<w>(p.first_row + i, load<w>(p.last_row + i));
  });
}

}  // namespace

template <typename State>
cudaError_t launch_flow_control(FlowMoment moment, const FlowPlan<State>& plan, const double* norms,
                                cudaStream_t stream) {
  return launch(flow_control_kernel<State>, 1, kWarp, 0, stream, plan, moment, norms);
}

template <typename State>
cudaError_t launch_flow_advance(const FlowAdvanceParams<State>& p, cudaStream_t stream) {
  if (p.size == 0) return cudaSuccess;
  const bool wide = aligned({p.y, p.y1, p.first_row, p.last_row, p.tape}) &&
                    p.kept % kFull<State> == 0 && p.size % kFull<State> == 0;
  const int width = wide ? kFull<State> : 1;
  return launch(wide ? flow_advance_kernel<State, kFull<State>> : flow_advance_kernel<State, 1>,
                blocks_for(p.size, int64_t(kThreads) * width), kThreads, 0, stream, p);
}

template cudaError_t launch_flow_control(FlowMoment, const FlowPlan<float>&, const double*,
                                         cudaStream_t);
template cudaError_t launch_flow_control(FlowMoment, const FlowPlan<double>&, const double*,
                                         cudaStream_t);
template cudaError_t launch_flow_advance(const FlowAdvanceParams<float>&, cudaStream_t);
template cudaError_t launch_flow_advance(const FlowAdvanceParams<double>&, cudaStream_t);

}  // namespace pycnf
