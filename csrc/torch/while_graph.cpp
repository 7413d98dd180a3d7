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
  // Of a cudaGraph_t that makes one attempt, which is copied, and two numbers that must stay where
  // they are.
  WhileGraph(uintptr_t one_attempt, const at::Tensor& done, const at::Tensor& failure)
      : device_(done.device()) {
    for (const auto& number : {done, failure}) {
      TORCH_CHECK(number.is_cuda() && number.scalar_type() == at::kDouble && number.numel() == 1,
                  "done and failure must be one float64 each on a GPU");
    }
    const c10::cuda::CUDAGuard guard(device_);
    C10_CUDA_CHECK(make_while_graph(reinterpret_cast<cudaGraph_t>(one_attempt),
                                    done.const_data_ptr<double>(), failure.const_data_ptr<double>(),
                                    &exec_));
  }

  WhileGraph(const WhileGraph&) = delete;
  WhileGraph& operator=(const WhileGraph&) = delete;

  ~WhileGraph() {
    // Python may let go of it while this thread captures other work, which only this mode allows.
    // Nothing throws here.
    auto mode = cudaStreamCaptureModeRelaxed;
    C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode));
    C10_CUDA_CHECK_WARN(cudaGraphExecDestroy(exec_));
    C10_CUDA_CHECK_WARN(cudaThreadExchangeStreamCaptureMode(&mode));
  }

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
      .def(py::init<uintptr_t, const at::Tensor&, const at::Tensor&>(), py::arg("one_attempt"),
           py::arg("done"), py::arg("failure"))
      .def("launch", &WhileGraph::launch);
}

}  // namespace pycnf
