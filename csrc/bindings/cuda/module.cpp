// qirl_fast._cuda: CUDA kernels, bound as addresses, sizes, strides and a stream.
#include <pybind11/pybind11.h>

namespace qirl::cuda {
void bind_flow_step(pybind11::module_& m);
}

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; arguments are addresses, sizes, strides and a stream.";
  qirl::cuda::bind_flow_step(m);
}
