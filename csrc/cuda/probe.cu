// Probe keys and probes. Both run once a solve, so they are kept plain.

#include "core/philox.h"
#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace pycnf {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    sample_probes_kernel(const __grid_constant__ ProbeParams<T> p) {
  const int64_t groups = (p.features + kProbeGroup - 1) / kProbeGroup;
  const int64_t work = p.probes * p.batch * groups;
  for (int64_t item = global_thread(); item < work; item += global_threads()) {
    const int64_t row = item / groups;  // of [K * B]
    const int64_t feature = (item - row * groups) * kProbeGroup;
    const int64_t probe = row / p.batch;
    const int64_t sample = row - probe * p.batch;
    T value[kProbeGroup];
    probe_group(p.seed, uint64_t(p.keys[sample]), uint32_t(probe), feature, p.gaussian, value);
    T* out = p.out + row * p.features + feature;
#pragma unroll
    for (int i = 0; i < kProbeGroup; ++i) {
      if (feature + i < p.features) out[i] = value[i];
    }
  }
}

// Small blocks: a row is one thread's, and a batch of a few thousand rows should still reach every
// multiprocessor.
constexpr int kKeyThreads = 64;

template <typename T>
__global__ void __launch_bounds__(kKeyThreads)
    hash_keys_kernel(const __grid_constant__ KeyParams<T> p, int64_t batch) {
  for (int64_t sample = global_thread(); sample < batch; sample += global_threads()) {
    p.keys[sample] = int64_t(hash_row(p.rows + sample * p.features, p.features));
  }
}

}  // namespace

template <typename T>
cudaError_t launch_sample_probes(const ProbeParams<T>& p, cudaStream_t stream) {
  const int64_t work = p.probes * p.batch * ((p.features + kProbeGroup - 1) / kProbeGroup);
  if (work == 0) return cudaSuccess;
  return launch(sample_probes_kernel<T>, blocks_for(work, kThreads), kThreads, 0, stream, p);
}

template <typename T>
cudaError_t launch_hash_keys(const KeyParams<T>& p, int64_t batch, cudaStream_t stream) {
  if (batch == 0) return cudaSuccess;
  return launch(hash_keys_kernel<T>, blocks_for(batch, kKeyThreads), kKeyThreads, 0, stream, p,
                batch);
}

template cudaError_t launch_sample_probes(const ProbeParams<float>&, cudaStream_t);
template cudaError_t launch_sample_probes(const ProbeParams<double>&, cudaStream_t);
template cudaError_t launch_hash_keys(const KeyParams<float>&, int64_t, cudaStream_t);
template cudaError_t launch_hash_keys(const KeyParams<double>&, int64_t, cudaStream_t);

}  // namespace pycnf
