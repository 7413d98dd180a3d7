// What the fused engine's ops on a GPU share: their arguments in device memory, and how the host waits.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "cuda/mlp_solve.h"
#include "torch/cuda_device.h"
#include "torch/interrupt.h"
#include "torch/mlp_arguments.h"

namespace pycnf {

// One call's arguments as the kernels want them, with the tensors that they point into.
template <typename T>
class DeviceSetup {
 public:
  DeviceSetup(const at::Tensor& x, const MlpArguments& arguments, bool own_times)
      : options(x.options().requires_grad(std::nullopt)), batch(x.size(0)) {
    check_cuda(x, "x");
    check_devices(arguments, x, "x");
    solve.own_times = own_times;
    read_solve(arguments, x, solve, tensors_, [&](const at::Tensor& parameter, int64_t count) {
      tensors_.push_back(count == 1 ? parameter.reshape({-1}).contiguous()
                                    : parameter.t().contiguous());
      return values<T>(tensors_.back());
    });
    tableau = *solve.tableau;
    solve.tableau = nullptr;
    probe_ = read_probe(arguments);
    if (probe_.defined()) solve.probe = values<T>(probe_);
    if (solve.drawn) read_noise(arguments);
    context_ = read_context(arguments, x, solve);
    if (context_.defined()) solve.context = values<T>(context_);
    rows = state_rows(solve);
    extras = extra_rows(solve);
  }

  TileSolve<T> tile_solve(const TilePlan& plan) const {
    TORCH_CHECK(plan.tiles > 0,
                "the network does not fit into the GPU's shared memory; mlp_solve_fits tells");
    return {solve, noise_, tableau, plan.layout, batch, plan.tiles};
  }

  FlowRule rule(const StepControl& control) const {
    FlowRule rule = {};
    rule.control = control;
    rule.order = tableau.order;
    rule.nodes = tableau.stages;
    std::copy_n(tableau.c, tableau.stages, rule.c);
    return rule;
  }

  at::Tensor empty(at::IntArrayRef sizes) const { return at::empty(sizes, options); }
  at::Tensor doubles(at::IntArrayRef sizes) const {
    return at::empty(sizes, options.dtype(at::kDouble));
  }

  MlpSolve<T> solve = {};
  Tableau tableau;
  at::TensorOptions options;
  int64_t batch;
  int64_t rows = 0;
  int64_t extras = 0;

 private:
  void read_noise(const MlpArguments& arguments) {
    noise_.seed = arguments.seed();
    noise_.gaussian = arguments.gaussian();
    keys_ = arguments.keys->contiguous();
    if (keys_.scalar_type() != at::kLong) {
      tensors_.push_back(keys_);
      noise_.rows = values<T>(keys_);
      keys_ = at::empty({batch}, options.dtype(at::kLong));
    }
    noise_.keys = keys_.mutable_data_ptr<int64_t>();
  }

  std::vector<at::Tensor> tensors_;
  at::Tensor probe_, keys_, context_;
  TileNoise<T> noise_ = {};
};

// Waits until the kernel has told how it ended. It tells in memory of the host, so no call of CUDA's
// stops the host; every now and then one asks whether the kernel is still at work. Who asks for an
// end meanwhile gets it when the kernel has ended, for it writes to that memory.
inline void wait_for_report(const volatile double* report, cudaStream_t stream) {
  using Clock = std::chrono::steady_clock;
  auto next = Clock::now() + std::chrono::milliseconds(1);
  while (report[1] == 0) {
    std::this_thread::yield();
    if (Clock::now() < next) continue;
    try {
      check_interrupt();
    } catch (...) {
      cudaStreamSynchronize(stream);
      throw;
    }
    const cudaError_t state = cudaStreamQuery(stream);
    if (state == cudaErrorNotReady) {
      // Nor is it one for whoever asks next for the last error.
      (void)cudaGetLastError();
    } else {
      C10_CUDA_CHECK(state);
      TORCH_CHECK(report[1] != 0, "the GPU has stopped amid a solve");
    }
    next = Clock::now() + std::chrono::milliseconds(1);
  }
  // What was told before is read after.
  std::atomic_thread_fence(std::memory_order_acquire);
}

inline void check_not_capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  C10_CUDA_CHECK(cudaStreamIsCapturing(stream, &status));
  TORCH_CHECK(status == cudaStreamCaptureStatusNone,
              "a solve of the fused engine cannot be captured in a CUDA graph: the host reads how "
              "many steps it took");
}

}  // namespace pycnf
