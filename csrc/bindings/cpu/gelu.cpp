#include "cpu/gelu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

void forward(const Array& x, const Array& y, const Fp8& fp8, int threads) {
  run_pointwise(gelu_kernels, {x}, {y}, threads, fp8);
}

void backward(const Array& dy, const Array& x, const Array& dx, int threads) {
  run_pointwise(gelu_backward_kernels, {dy, x}, {dx}, threads);
}

const Binding binding([](py::module_& m) {
  m.def("gelu", &forward);
  m.def("gelu_backward", &backward);
});

}  // namespace

}  // namespace qirl
