#include "torch/while_graph.h"

#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "cuda/while_graph.h"

namespace pycnf {
namespace {

namespace py = pybind11;

class WhileGraph {
 public:
  // Of a cudaGraph_t that makes one attempt, which is copied, and the attempt's numbers, which must
  // stay where they are.
  WhileGraph(uintptr_t one_attempt, const at::Tensor& attempt) : device_(attempt.device()) {
    TORCH_CHECK(attempt.is_cuda() && attempt.scalar_type() == at::kDouble &&
                    attempt.numel() == kAttemptNumbers && attempt.is_contiguous(),
                "attempt must be the numbers of an attempt on a GPU");
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(make_while_graph(reinterpret_cast<cudaGraph_t>(one_attempt),
                                    reinterpret_cast<const Attempt*>(attempt.data_ptr<double>()),
                                    &exec_));
  }

  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  ~WhileGraph() { cudaGraphExecDestroy(exec_); }

  void launch() const {
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(cudaGraphLaunch(exec_, c10::cuda::getCurrentCUDAStream().stream()));
  }

 private:
  at::Device device_;
  cudaGraphExec_t exec_ = nullptr;
};

}  // namespace

void bind_while_graph(py::module_& m) {
  py::class_<WhileGraph>(m, "WhileGraph")
      .def(py::init<uintptr_t, const at::Tensor&>(), py::arg("one_attempt"), py::arg("attempt"))
      .def("launch", &WhileGraph::launch);
}

}  // namespace pycnf
