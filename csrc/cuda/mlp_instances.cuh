// For the sources that have the narrow networks' kernels of one precision each; they compile long.
#pragma once

#include "cuda/mlp_gradient.cuh"
#include "cuda/mlp_solve.cuh"

#define PYCNF_MLP_KERNELS(T, precision)                                                        \
  template cudaError_t plan_solve_in<T, precision>(const MlpSolve<T>&, int64_t, TilePlan*);    \
  template cudaError_t plan_gradient_in<T, precision>(const MlpSolve<T>&, int64_t, TilePlan*); \
  template cudaError_t launch_mlp_solve_in<T, precision>(const MlpSolveParams<T>&,             \
                                                         const TilePlan&, cudaStream_t);       \
  template cudaError_t launch_mlp_gradient_in<T, precision>(const MlpGradientParams<T>&,       \
                                                            const TilePlan&, cudaStream_t)
