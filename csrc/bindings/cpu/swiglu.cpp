#include "cpu/swiglu.h"

#include "bindings/cpu/pointwise.h"

namespace qirl {
namespace {

void forward(const Rows& gate, const Rows& up, uintptr_t y, const Fp8& fp8, int64_t rows,
             int64_t width, int threads) {
  run_pointwise(swiglu_kernels, {gate, up}, {y}, rows, width, threads, fp8);
}

void backward(const Rows& dy, const Rows& gate, const Rows& up, uintptr_t dgate, uintptr_t dup,
              int64_t rows, int64_t width, int threads) {
  run_pointwise(swiglu_backward_kernels, {dy, gate, up}, {dgate, dup}, rows, width, threads);
}

const Binding binding([](py::module_& m) {
  m.def("swiglu", &forward);
  m.def("swiglu_backward", &backward);
});

}  // namespace

}  // namespace qirl
