#include "cuda/norm.h"

#include "bindings/cuda/ops.h"
#include "bindings/norm.h"

namespace qirl::cuda {
namespace {

void forward(const Array& x, const Array& u, const ThreeRows& rows, const ThreeRows& rows_t0,
             const Array& t0, const Array& y, const Array& out, const Array& mean,
             const Array& rstd, const Fp8& fp8, int64_t chunk, bool tanh, double eps,
             uintptr_t stream) {
  check("norm_forward", norm_forward(norm_forward_args(x, u, rows, rows_t0, t0, y, out, mean, rstd,
                                                       fp8, chunk, tanh, eps),
                                     as_pointer(stream)));
}

void backward(const std::array<Array, 2>& grads, const Array& x, const Array& u, const Array& mean,
              const Array& rstd, const ThreeRows& rows, const ThreeRows& rows_t0, const Array& t0,
              const Array& dx, const Array& du, const std::array<ThreeRows, 2>& partial,
              const std::array<ThreeRows, 2>& sums, int64_t chunk, bool tanh, uintptr_t stream) {
  const NormArgs a =
      norm_backward_args(grads, x, u, mean, rstd, rows, rows_t0, t0, dx, du, partial, chunk, tanh);
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
