#include "cuda/norm.h"

#include "bindings/cuda/ops.h"
#include "bindings/norm.h"

namespace qirl::cuda {
namespace {

void forward(const Rows& x, const Rows& u, const ThreeRows& rows, const ThreeRows& rows_t0,
             const T0& t0, uintptr_t y, uintptr_t out, uintptr_t mean, uintptr_t rstd,
             const Fp8& fp8, const NormSizes& sizes, bool tanh, double eps, uintptr_t stream) {
  check("norm_forward", norm_forward(norm_forward_args(x, u, rows, rows_t0, t0, y, out, mean, rstd,
                                                       fp8, sizes, tanh, eps),
                                     as_pointer(stream)));
}

void backward(const std::array<Rows, 2>& grads, const Rows& x, const Rows& u, uintptr_t mean,
              uintptr_t rstd, const ThreeRows& rows, const ThreeRows& rows_t0, const T0& t0,
              uintptr_t dx, uintptr_t du, const std::array<ThreeAddresses, 2>& partial,
              const std::array<ThreeAddresses, 2>& sums, const NormSizes& sizes, bool tanh,
              uintptr_t stream) {
  const NormArgs a =
      norm_backward_args(grads, x, u, mean, rstd, rows, rows_t0, t0, dx, du, partial, sizes, tanh);
  check("norm_backward", norm_backward(a, as_pointer(stream)));
  const auto finish = norm_finish_args(a, sums);
  if (finish.empty()) return;
  check("norm_finish", norm_finish(finish.data(), (int)finish.size(), as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
