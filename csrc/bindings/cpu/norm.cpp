#include "cpu/norm.h"

#include <pybind11/stl.h>

#include <array>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

using ThreeRows = std::array<Rows, kNormRows>;            // gate, scale, shift
using ThreeAddresses = std::array<uintptr_t, kNormRows>;  // in the same order
using T0 = std::tuple<uintptr_t, int64_t, int64_t>;       // address and strides
using Sizes = std::tuple<int64_t, int64_t, int64_t>;      // samples, tokens, width

NormRow row_of(const Rows& r) { return {address_of(r), stride_of(r), dtype_of(r)}; }

NormArgs arguments(const ThreeRows& rows, const ThreeRows& rows_t0, const T0& t0,
                   const Sizes& sizes, bool tanh) {
  NormArgs a{};
  for (int k = 0; k < kNormRows; ++k) {
    a.rows[0][k] = row_of(rows[k]);
    a.rows[1][k] = row_of(rows_t0[k]);
  }
  a.t0 = as_pointer<uint8_t>(std::get<0>(t0));
  std::tie(std::ignore, a.t0_sample, a.t0_token) = t0;
  std::tie(a.samples, a.tokens, a.width) = sizes;
  a.tanh = tanh;
  return a;
}

void run(const Kernel (&table)[kIsaCount], NormArgs& a, int out_dtype, int threads) {
  const int64_t count = a.samples * a.tokens, y_bytes = a.width * dtype_bytes(a.x_dtype);
  const int64_t out_bytes = a.width * dtype_bytes(out_dtype);
  a.stream = (a.y == nullptr || worth_streaming(a.y, y_bytes, count)) &&
             (a.out == nullptr || worth_streaming(a.out, out_bytes, count));
  const int64_t tasks = a.samples * norm_chunks(a.tokens);
  const int64_t chunk = a.width * (a.tokens < kNormChunk ? a.tokens : kNormChunk);
  const int64_t grain = 1 + 16384 / chunk;
  run_kernel(table, &a, tasks, grain, threads);
}

// x alone: norm_modulate; u without y: gate_residual; both: the two in one pass.
void forward(const Rows& x, const Rows& u, const ThreeRows& rows, const ThreeRows& rows_t0,
             const T0& t0, uintptr_t y, uintptr_t out, uintptr_t mean, uintptr_t rstd,
             const Sizes& sizes, bool tanh, double eps, int threads) {
  NormArgs a = arguments(rows, rows_t0, t0, sizes, tanh);
  a.x = address_of(x);
  a.u = address_of(u);
  a.x_dtype = dtype_of(x);
  a.u_dtype = dtype_of(u);
  a.y = as_pointer(y);
  a.out = as_pointer(out);
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
  a.eps = (float)eps;
  py::gil_scoped_release released;
  run(a.u == nullptr   ? norm_modulate_kernels
      : a.y == nullptr ? gate_residual_kernels
                       : gate_residual_norm_modulate_kernels,
      a, a.x_dtype, threads);
}

// grads: dy, dout. partial and sums: addresses of the chunks' sums and of their totals, 0 where not
// wanted, for the rows and for rows_t0.
void backward(const std::array<Rows, 2>& grads, const Rows& x, const Rows& u, uintptr_t mean,
              uintptr_t rstd, const ThreeRows& rows, const ThreeRows& rows_t0, const T0& t0,
              uintptr_t dx, uintptr_t du, const std::array<ThreeAddresses, 2>& partial,
              const std::array<ThreeAddresses, 2>& sums, const Sizes& sizes, bool tanh,
              int threads) {
  NormArgs a = arguments(rows, rows_t0, t0, sizes, tanh);
  a.dy = address_of(grads[0]);
  a.dout = address_of(grads[1]);
  a.x = address_of(x);
  a.u = address_of(u);
  a.x_dtype = a.dy ? dtype_of(grads[0]) : dtype_of(grads[1]);
  a.u_dtype = dtype_of(u);
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
  a.y = as_pointer(dx);
  a.out = as_pointer(du);
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) a.partial[k][r] = as_pointer<float>(partial[k][r]);
  }
  py::gil_scoped_release released;
  run(a.u == nullptr    ? norm_modulate_backward_kernels
      : a.dy == nullptr ? gate_residual_backward_kernels
                        : gate_residual_norm_modulate_backward_kernels,
      a, a.u_dtype, threads);
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) {
      if (sums[k][r] == 0) continue;
      NormFinishArgs f{};
      f.partial = a.partial[k][r];
      f.out = as_pointer<float>(sums[k][r]);
      if (r == kGate && tanh) f.gate = a.rows[k][r];
      f.chunks = norm_chunks(a.tokens);
      f.width = a.width;
      const int64_t blocks = (a.width + kNormColumns - 1) / kNormColumns;
      run_kernel(norm_finish_kernels, &f, a.samples * blocks, 1 + 128 / f.chunks, threads);
    }
  }
}

const Binding binding([](py::module_& m) {
  m.def("norm_forward", &forward);
  m.def("norm_backward", &backward);
});

}  // namespace

}  // namespace qirl
