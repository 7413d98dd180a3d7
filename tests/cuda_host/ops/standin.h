// Comes before all else of csrc/torch's sources, so that their CUDA ops become those of a device
// whose memory is the host's (device.cpp), in a library of their own, torch.ops.pycnf_cuda_host.
#pragma once

#include <ATen/ATen.h>
#include <torch/library.h>

// All headers that mean the real ones have been read.
#define CUDA PrivateUse1
#define kCUDA kPrivateUse1
#define is_cuda is_privateuseone

// Beside the real library, which may have ops for a real GPU.
#undef TORCH_LIBRARY
#define TORCH_LIBRARY(library, m) TORCH_LIBRARY_FRAGMENT(pycnf_cuda_host, m)
#undef TORCH_LIBRARY_IMPL
#define TORCH_LIBRARY_IMPL(library, key, m) _TORCH_LIBRARY_IMPL(pycnf_cuda_host, key, m, C10_UID)

// All of the host's memory is the device's.
#define pinned_memory(wanted) pinned_memory(false)
