// Memory that is kept from solve to solve.
#pragma once

#include <ATen/ATen.h>

namespace pycnf {

// An uninitialized tensor of `count` numbers on the CPU, whose memory goes back to a small store
// when it is freed. The stages of a solve are megabytes that are written once and read once; fresh
// pages for them from the system take as long as the arithmetic.
at::Tensor recycled(int64_t count, at::TensorOptions options);

}  // namespace pycnf
