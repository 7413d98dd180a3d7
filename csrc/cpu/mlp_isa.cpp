// The fused engine's kernels. Compiled once per instruction set, like kernels_isa.cpp, but with
// products and sums fused: nothing here has to round as another program does.

#include <type_traits>

#include "core/elementary.h"
#include "core/mlp.h"
#include "core/mlp_field.h"
#include "core/mlp_solve.h"
#include "core/philox.h"
#include "cpu/kernels.h"

namespace pycnf {
namespace PYCNF_ISA {
namespace {

#include "cpu/simd.h"
//
#include "core/activation.h"
#include "cpu/product.h"
//
#include "cpu/mlp_tile.h"

template <bool kOwn, typename T>
constexpr ActivateLayer<T> kActivateLayer[kActivations] = {
    activate_layer<Activation::kTanh, kOwn, T>,   activate_layer<Activation::kSoftplus, kOwn, T>,
    activate_layer<Activation::kElu, kOwn, T>,    activate_layer<Activation::kSilu, kOwn, T>,
    activate_layer<Activation::kSelu, kOwn, T>,   activate_layer<Activation::kRelu, kOwn, T>,
    activate_layer<Activation::kGelu, kOwn, T>,   activate_layer<Activation::kSin, kOwn, T>,
    activate_layer<Activation::kSquare, kOwn, T>, activate_layer<Activation::kIdentity, kOwn, T>,
};

template <bool kOwn, typename T>
constexpr ReverseActivation<T> kReverseActivation[kActivations] = {
    reverse_activation<Activation::kTanh, kOwn, T>,
    reverse_activation<Activation::kSoftplus, kOwn, T>,
    reverse_activation<Activation::kElu, kOwn, T>,
    reverse_activation<Activation::kSilu, kOwn, T>,
    reverse_activation<Activation::kSelu, kOwn, T>,
    reverse_activation<Activation::kRelu, kOwn, T>,
    reverse_activation<Activation::kGelu, kOwn, T>,
    reverse_activation<Activation::kSin, kOwn, T>,
    reverse_activation<Activation::kSquare, kOwn, T>,
    reverse_activation<Activation::kIdentity, kOwn, T>,
};

#include "cpu/mlp_steps.h"
//
#include "cpu/mlp_reverse.h"
//
#include "cpu/mlp_adjoint.h"
#include "cpu/mlp_field.h"
#include "cpu/mlp_time.h"
#include "cpu/mlp_trace.h"

template <bool kOwn, typename T>
constexpr CpuMlpSteps<T> kSteps = {
    first_stage<kOwn, T>,   trial<kOwn, T>,         attempt_step<kOwn, T>,    reverse_step<kOwn, T>,
    adjoint_first<kOwn, T>, adjoint_trial<kOwn, T>, adjoint_attempt<kOwn, T>,
};

template <bool kOwn, typename T>
constexpr CpuMlpField<T> kField = {field_forward<kOwn, T>, field_reverse<kOwn, T>,
                                   field_vjp<kOwn, T>};

template <typename T>
constexpr CpuMlpTable<T> kTable = {
    kLanes<T>,        kept_numbers<T>,  workspace_numbers<T>, timed_numbers<T>,
    time_layers<T>,   mixed_numbers<T>, mixing_numbers<T>,    mix<T>,
    unmix<T>,         kSteps<false, T>, kSteps<true, T>,      adjoint_quadrature<T>,
    field_numbers<T>, kField<false, T>, kField<true, T>,
};

}  // namespace

extern const CpuMlpKernels kMlpKernels = {kTable<float>, kTable<double>};

}  // namespace PYCNF_ISA
}  // namespace pycnf
