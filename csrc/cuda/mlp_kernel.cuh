// What the kernels with a narrow network share, once in each source of theirs.
#pragma once

#include <type_traits>

#include "core/elementary.h"
#include "core/philox.h"
#include "core/rk.h"
#include "cuda/device.cuh"
#include "cuda/mlp_solve.h"
#include "cuda/tile_tensor.cuh"

namespace pycnf {
namespace {

#include "cuda/scalar.cuh"
//
#include "core/activation.h"
//
#include "cuda/mlp_tile.cuh"

}  // namespace
}  // namespace pycnf
