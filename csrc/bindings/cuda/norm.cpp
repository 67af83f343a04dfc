#include "cuda/norm.h"

#include <pybind11/stl.h>

#include "bindings/cuda/ops.h"
#include "bindings/norm.h"

namespace qirl::cuda {
namespace {

// x alone: norm_modulate; u without y: gate_residual; both: the two in one pass.
void forward(const Array& x, const Array& u, const ThreeRows& rows, const ThreeRows& rows_t0,
             const Array& t0, const Array& y, const Array& out, const Array& mean,
             const Array& rstd, const Fp8& fp8, int64_t chunk, bool tanh, double eps,
             uintptr_t stream) {
  NormArgs a = norm_args(x, rows, rows_t0, t0, chunk, tanh);
  norm_inputs(a, x, u);
  a.y = as_pointer(y);
  a.out = as_pointer(out);
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
  a.fp8 = fp8_out(fp8);
  a.eps = (float)eps;
  check("norm_forward", norm_forward(a, as_pointer(stream)));
}

// grads: dy, dout; partial, sums: for the rows and for rows_t0, absent where not wanted.
void backward(const std::array<Array, 2>& grads, const Array& x, const Array& u, const Array& mean,
              const Array& rstd, const ThreeRows& rows, const ThreeRows& rows_t0, const Array& t0,
              const Array& dx, const Array& du, const std::array<ThreeRows, 2>& partial,
              const std::array<ThreeRows, 2>& sums, int64_t chunk, bool tanh, uintptr_t stream) {
  const auto& [dy, dout] = grads;
  NormArgs a = norm_args(dy.data ? dy : dout, rows, rows_t0, t0, chunk, tanh);
  norm_inputs(a, x, u);
  norm_gradients(a, dy, dout, mean, rstd);
  a.y = as_pointer(dx);
  a.out = as_pointer(du);
  float* out[2][kNormRows];
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) {
      a.partial[k][r] = as_pointer<float>(partial[k][r]);
      out[k][r] = as_pointer<float>(sums[k][r]);
    }
  }
  check("norm_backward", norm_backward(a, as_pointer(stream)));
  const auto finish = norm_finish_args(a, out);
  if (finish.empty()) return;
  check("norm_finish", norm_finish(finish.data(), (int)finish.size(), as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
