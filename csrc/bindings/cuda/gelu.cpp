#include "cuda/gelu.h"

#include "bindings/cuda/pointwise.h"

namespace qirl::cuda {
namespace {

void forward(const Array& x, const Array& y, const Fp8& fp8, uintptr_t stream) {
  check("gelu", gelu(pointwise_args({x}, {y}, fp8), as_pointer(stream)));
}

void backward(const Array& dy, const Array& x, const Array& dx, uintptr_t stream) {
  check("gelu_backward", gelu_backward(pointwise_args({dy, x}, {dx}), as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("gelu", &forward);
  m.def("gelu_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
