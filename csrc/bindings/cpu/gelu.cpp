#include "cpu/gelu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

py::tuple forward(const Matrix& x, const std::string& quantize, int threads) {
  return run_quantizing(gelu_kernels, {x}, quantize, threads);
}

py::object backward(const Matrix& dy, const Matrix& x, int threads) {
  const Output dx = output_like(x, x.dtype());
  run_pointwise(gelu_backward_kernels, {dy, x}, {dx}, threads);
  return dx.tensor;
}

const Binding binding([](py::module_& m) {
  m.def("gelu", &forward);
  m.def("gelu_backward", &backward);
});

}  // namespace

}  // namespace qirl
