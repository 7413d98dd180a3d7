// The fused engine's kernels. Compiled once per instruction set, like kernels_isa.cpp, but with
// products and sums fused: nothing here has to round as another program does.

#include "core/elementary.h"
#include "core/mlp.h"
#include "core/mlp_solve.h"
#include "cpu/kernels.h"

namespace pycnf {
namespace PYCNF_ISA {
namespace {

#include "cpu/simd.h"
//
#include "cpu/activation.h"
#include "cpu/product.h"
//
#include "cpu/mlp_tile.h"

template <typename T>
constexpr ActivateLayer<T> kActivateLayer[kActivations] = {
    activate_layer<Activation::kTanh, T>,   activate_layer<Activation::kSoftplus, T>,
    activate_layer<Activation::kElu, T>,    activate_layer<Activation::kSilu, T>,
    activate_layer<Activation::kSelu, T>,   activate_layer<Activation::kRelu, T>,
    activate_layer<Activation::kGelu, T>,   activate_layer<Activation::kSin, T>,
    activate_layer<Activation::kSquare, T>, activate_layer<Activation::kIdentity, T>,
};

template <typename T>
constexpr ReverseActivation<T> kReverseActivation[kActivations] = {
    reverse_activation<Activation::kTanh, T>,   reverse_activation<Activation::kSoftplus, T>,
    reverse_activation<Activation::kElu, T>,    reverse_activation<Activation::kSilu, T>,
    reverse_activation<Activation::kSelu, T>,   reverse_activation<Activation::kRelu, T>,
    reverse_activation<Activation::kGelu, T>,   reverse_activation<Activation::kSin, T>,
    reverse_activation<Activation::kSquare, T>, reverse_activation<Activation::kIdentity, T>,
};

#include "cpu/mlp_steps.h"
//
#include "cpu/mlp_time.h"

template <typename T>
constexpr CpuMlpTable<T> kTable = {
    kLanes<T>,      kept_numbers<T>, workspace_numbers<T>, time_layers<T>,
    first_stage<T>, trial<T>,        attempt_step<T>,      reverse_step<T>,
};

}  // namespace

extern const CpuMlpKernels kMlpKernels = {kTable<float>, kTable<double>};

}  // namespace PYCNF_ISA
}  // namespace pycnf
