#include "cpu/gelu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

void forward(const Rows& x, uintptr_t y, const Fp8& fp8, int64_t rows, int64_t width, int threads) {
  run_pointwise(gelu_kernels, {x}, {y}, rows, width, threads, fp8);
}

void backward(const Rows& dy, const Rows& x, uintptr_t dx, int64_t rows, int64_t width,
              int threads) {
  run_pointwise(gelu_backward_kernels, {dy, x}, {dx}, rows, width, threads);
}

const Binding binding([](py::module_& m) {
  m.def("gelu", &forward);
  m.def("gelu_backward", &backward);
});

}  // namespace

}  // namespace qirl
