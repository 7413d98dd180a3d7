// How many fused multiply-adds in f32 a GPU does: prints GFLOP/s, of the fastest of some launches.
// A thread has eight sums that do not wait for each other, all in registers.

#include <cstdio>

constexpr int kSums = 8, kThreads = 256, kRounds = 1 << 12, kUnrolled = 16;

__global__ void __launch_bounds__(kThreads) multiply_add(float* out, float a, float b) {
  float sum[kSums];
  for (int i = 0; i < kSums; ++i) sum[i] = float(threadIdx.x + i);
  for (int round = 0; round < kRounds; ++round) {
#pragma unroll
    for (int again = 0; again < kUnrolled; ++again) {
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = fmaf(sum[i], a, b);
    }
  }
  float total = 0;
  for (int i = 0; i < kSums; ++i) total += sum[i];
  // Never so; but the compiler cannot know.
  if (total == 12345.678f) out[0] = total;
}

int main() {
  int processors = 0;
  float* out = nullptr;
  cudaEvent_t begin, end;
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, 0);
  cudaMalloc(&out, sizeof(float));
  cudaEventCreate(&begin);
  cudaEventCreate(&end);
  const int blocks = 8 * processors;  // 2048 threads each, as many as there may be
  float fastest = 0;
  for (int launch = 0; launch < 20; ++launch) {
    cudaEventRecord(begin);
    multiply_add<<<blocks, kThreads>>>(out, 0.999f, 0.001f);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    float milliseconds = 0;
    cudaEventElapsedTime(&milliseconds, begin, end);
    if (launch == 1 || milliseconds < fastest) fastest = milliseconds;
  }
  const cudaError_t error = cudaDeviceSynchronize();
  if (error != cudaSuccess) {
    std::fprintf(stderr, "%s\n", cudaGetErrorString(error));
    return 1;
  }
  const double flops = 2.0 * kSums * kUnrolled * kRounds * double(kThreads) * blocks;
  std::printf("%.0f\n", flops / (1e6 * fastest));
  return 0;
}
