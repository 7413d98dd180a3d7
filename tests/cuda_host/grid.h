// Runs a grid of threads on one OS thread; see cuda_runtime.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "cuda_runtime_api.h"

namespace cuda_host {

// Of the thread that runs.
extern uint3 thread_index, block_index;
extern dim3 block_size, grid_size;

// `address` tells kernels apart; `kernel` is one with its arguments.
cudaError_t run(const cudaLaunchConfig_t& config, const void* address,
                const std::function<void()>& kernel);

// For kernels alone:

void wait_for_block();
void wait_for_grid();
void nap();
// Waits for the lanes of `mask` in the warp, and returns what the lane `source` gave.
uint64_t exchange(uint32_t mask, uint64_t value, int source);
// Waits for them, and returns a bit for each of them that gave true.
uint32_t vote(uint32_t mask, bool value);
// Ends the launch with an error.
[[noreturn]] void fail(const char* why);
// The block's dynamic shared memory.
unsigned char* shared_memory();

}  // namespace cuda_host

extern "C" {
// What the order of threads and blocks is drawn from, from now on.
void cuda_host_seed(uint64_t seed);
// How many multiprocessors the device has, from now on; 4 at first.
void cuda_host_multiprocessors(int count);
// Why the last launch that failed did.
const char* cuda_host_error();
}
