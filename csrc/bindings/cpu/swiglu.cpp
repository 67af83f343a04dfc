#include "cpu/swiglu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

py::tuple forward(const Matrix& gate, const Matrix& up, const std::string& quantize, int threads) {
  return run_quantizing(swiglu_kernels, {gate, up}, quantize, threads);
}

// Returns dgate and dup.
py::tuple backward(const Matrix& dy, const Matrix& gate, const Matrix& up, int threads) {
  const Output dgate = output_like(gate, gate.dtype()), dup = output_like(up, up.dtype());
  run_pointwise(swiglu_backward_kernels, {dy, gate, up}, {dgate, dup}, threads);
  return py::make_tuple(dgate.tensor, dup.tensor);
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &forward);
  m.def("swiglu_backward", &backward);
});

}  // namespace

}  // namespace qirl
