// qirl_fast._cuda: CUDA kernels, bound as addresses, sizes, strides and a stream.
#include "bindings/bind.h"

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA kernels; arguments are addresses, sizes, strides and a stream.";
  qirl::Binding::bind_all(m);
}
