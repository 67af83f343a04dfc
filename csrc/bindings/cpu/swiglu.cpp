#include "cpu/swiglu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

void forward(const Array& gate, const Array& up, const Array& y, const Fp8& fp8, int threads) {
  run_pointwise(swiglu_kernels, {gate, up}, {y}, threads, fp8);
}

void backward(const Array& dy, const Array& gate, const Array& up, const Array& dgate,
              const Array& dup, int threads) {
  run_pointwise(swiglu_backward_kernels, {dy, gate, up}, {dgate, dup}, threads);
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &forward);
  m.def("swiglu_backward", &backward);
});

}  // namespace

}  // namespace qirl
