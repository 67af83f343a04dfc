#include "cpu/norm.h"

#include "bindings/cpu/ops.h"
#include "bindings/norm.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

void run(const Kernel (&table)[kIsaCount], NormArgs& a, int out_dtype, int threads) {
  const int64_t count = a.samples * a.tokens, y_bytes = a.width * dtype_bytes(a.x_dtype);
  const int64_t out_bytes = a.width * dtype_bytes(out_dtype);
  a.stream = (a.y == nullptr || worth_streaming(a.y, y_bytes, count)) &&
             (a.out == nullptr || worth_streaming(a.out, out_bytes, count));
  const int64_t chunk = a.width * (a.tokens < a.chunk ? a.tokens : a.chunk);
  const int64_t grain = 1 + 16384 / chunk;
  run_kernel(table, &a, a.samples * norm_chunks(a), grain, threads);
}

void forward(const Array& x, const Array& u, const ThreeRows& rows, const ThreeRows& rows_t0,
             const Array& t0, const Array& y, const Array& out, const Array& mean,
             const Array& rstd, const Fp8& fp8, int64_t chunk, bool tanh, double eps, int threads) {
  NormArgs a =
      norm_forward_args(x, u, rows, rows_t0, t0, y, out, mean, rstd, fp8, chunk, tanh, eps);
  py::gil_scoped_release released;
  run(a.u == nullptr   ? norm_modulate_kernels
      : a.y == nullptr ? gate_residual_kernels
                       : gate_residual_norm_modulate_kernels,
      a, a.x_dtype, threads);
}

void backward(const std::array<Array, 2>& grads, const Array& x, const Array& u, const Array& mean,
              const Array& rstd, const ThreeRows& rows, const ThreeRows& rows_t0, const Array& t0,
              const Array& dx, const Array& du, const std::array<ThreeRows, 2>& partial,
              const std::array<ThreeRows, 2>& sums, int64_t chunk, bool tanh, int threads) {
  NormArgs a =
      norm_backward_args(grads, x, u, mean, rstd, rows, rows_t0, t0, dx, du, partial, chunk, tanh);
  py::gil_scoped_release released;
  run(a.u == nullptr    ? norm_modulate_backward_kernels
      : a.dy == nullptr ? gate_residual_backward_kernels
                        : gate_residual_norm_modulate_backward_kernels,
      a, a.u_dtype, threads);
  for (const NormFinishArgs& f : norm_finish_args(a, sums)) {
    const int64_t blocks = (f.width + kNormColumns - 1) / kNormColumns;
    run_kernel(norm_finish_kernels, &f, f.samples * blocks, 1 + 128 / f.chunks, threads);
  }
}

const Binding binding([](py::module_& m) {
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
});

}  // namespace

}  // namespace qirl
