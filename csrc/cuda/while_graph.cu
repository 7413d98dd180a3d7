// A graph whose body, one attempt, is repeated until the solve has ended.

#include "cuda/while_graph.h"

#include <cuda_runtime.h>

namespace pycnf {

#if CUDART_VERSION >= 12040

namespace {

__global__ void go_on_kernel(cudaGraphConditionalHandle handle, const double* done,
                             const double* failure) {
  cudaGraphSetConditional(handle, *done == 0 && *failure == 0);
}

cudaError_t add_node(cudaGraphNode_t* node, cudaGraph_t graph, const cudaGraphNode_t* after,
                     cudaGraphNodeParams* params) {
#if CUDART_VERSION >= 13000
  return cudaGraphAddNode(node, graph, after, nullptr, after == nullptr ? 0 : 1, params);
#else
  return cudaGraphAddNode(node, graph, after, after == nullptr ? 0 : 1, params);
#endif
}

cudaError_t add_decision(cudaGraph_t graph, const cudaGraphNode_t* after,
                         cudaGraphConditionalHandle handle, const double* done,
                         const double* failure, cudaGraphNode_t* node) {
  void* arguments[] = {&handle, &done, &failure};
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeKernel;
  params.kernel.func = reinterpret_cast<void*>(go_on_kernel);
  params.kernel.gridDim = dim3(1);
  params.kernel.blockDim = dim3(1);
  params.kernel.kernelParams = arguments;
  return add_node(node, graph, after, &params);
}

// decision -> while (decision) { attempt -> decision }: a solve may have failed before its first
// attempt.
cudaError_t fill(cudaGraph_t graph, cudaGraph_t one_attempt, const double* done,
                 const double* failure) {
  cudaGraphConditionalHandle handle;
  auto error = cudaGraphConditionalHandleCreate(&handle, graph, 0, cudaGraphCondAssignDefault);
  if (error != cudaSuccess) return error;
  cudaGraphNode_t first, loop, body, decision;
  error = add_decision(graph, nullptr, handle, done, failure, &first);
  if (error != cudaSuccess) return error;
  cudaGraphNodeParams params = {};
  params.type = cudaGraphNodeTypeConditional;
  params.conditional.handle = handle;
  params.conditional.type = cudaGraphCondTypeWhile;
  params.conditional.size = 1;
  error = add_node(&loop, graph, &first, &params);
  if (error != cudaSuccess) return error;
  const cudaGraph_t inner = params.conditional.phGraph_out[0];
  error = cudaGraphAddChildGraphNode(&body, inner, nullptr, 0, one_attempt);
  if (error != cudaSuccess) return error;
  return add_decision(inner, &body, handle, done, failure, &decision);
}

}  // namespace

cudaError_t make_while_graph(cudaGraph_t one_attempt, const double* done, const double* failure,
                             cudaGraphExec_t* result) {
  cudaGraph_t graph;
  auto error = cudaGraphCreate(&graph, 0);
  if (error != cudaSuccess) return error;
  error = fill(graph, one_attempt, done, failure);
  if (error == cudaSuccess) error = cudaGraphInstantiate(result, graph, 0);
  cudaGraphDestroy(graph);
  return error;
}

#else

cudaError_t make_while_graph(cudaGraph_t, const double*, const double*, cudaGraphExec_t*) {
  return cudaErrorNotSupported;
}

#endif

}  // namespace pycnf
