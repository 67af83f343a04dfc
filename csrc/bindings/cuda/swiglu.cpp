#include "cuda/swiglu.h"

#include "bindings/cuda/pointwise.h"

namespace qirl::cuda {
namespace {

void forward(const Array& gate, const Array& up, const Array& y, const Fp8& fp8, uintptr_t stream) {
  const PointwiseArgs args = pointwise_args({gate, up}, {y}, fp8);
  check("swiglu", swiglu(args, as_pointer(stream)));
}

void backward(const Array& dy, const Array& gate, const Array& up, const Array& dgate,
              const Array& dup, uintptr_t stream) {
  const PointwiseArgs args = pointwise_args({dy, gate, up}, {dgate, dup});
  check("swiglu_backward", swiglu_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &forward);
  m.def("swiglu_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
