#include "cuda/swiglu.h"

#include "bindings/cuda/pointwise.h"

namespace qirl::cuda {
namespace {

void forward(const Rows& gate, const Rows& up, uintptr_t y, const Fp8& fp8, int64_t rows,
             int64_t width, uintptr_t stream) {
  const PointwiseArgs args = pointwise_args({gate, up}, {y}, rows, width, fp8);
  check("swiglu", swiglu(args, as_pointer(stream)));
}

void backward(const Rows& dy, const Rows& gate, const Rows& up, uintptr_t dgate, uintptr_t dup,
              int64_t rows, int64_t width, uintptr_t stream) {
  const PointwiseArgs args = pointwise_args({dy, gate, up}, {dgate, dup}, rows, width);
  check("swiglu_backward", swiglu_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &forward);
  m.def("swiglu_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
