// `_C.WhileGraph`: recorded attempts as one launch.
#pragma once

#include <torch/extension.h>

namespace pycnf {

void bind_while_graph(pybind11::module_& m);

}  // namespace pycnf
