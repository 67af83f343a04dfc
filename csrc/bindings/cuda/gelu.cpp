#include "cuda/gelu.h"

#include "bindings/cuda/pointwise.h"

namespace qirl::cuda {
namespace {

void forward(const Rows& x, uintptr_t y, const Fp8& fp8, int64_t rows, int64_t width,
             uintptr_t stream) {
  check("gelu", gelu(pointwise_args({x}, {y}, rows, width, fp8), as_pointer(stream)));
}

void backward(const Rows& dy, const Rows& x, uintptr_t dx, int64_t rows, int64_t width,
              uintptr_t stream) {
  check("gelu_backward",
        gelu_backward(pointwise_args({dy, x}, {dx}, rows, width), as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("gelu", &forward);
  m.def("gelu_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
