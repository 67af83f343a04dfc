// How norm_modulate and the gated residuals cross from Python, for the CPU and the GPU alike.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/bind.h"
#include "math/norm_args.h"

namespace qirl {

using ThreeRows = std::array<Rows, kNormRows>;                     // gate, scale, shift
using ThreeAddresses = std::array<uintptr_t, kNormRows>;           // in the same order
using T0 = std::tuple<uintptr_t, int64_t, int64_t>;                // address and strides
using NormSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // samples, tokens, width, chunk

inline NormRow norm_row(const Rows& r) { return {address_of(r), stride_of(r), dtype_of(r)}; }

inline NormArgs norm_args(const ThreeRows& rows, const ThreeRows& rows_t0, const T0& t0,
                          const NormSizes& sizes, bool tanh) {
  NormArgs a{};
  for (int k = 0; k < kNormRows; ++k) {
    a.rows[0][k] = norm_row(rows[k]);
    a.rows[1][k] = norm_row(rows_t0[k]);
  }
  a.t0 = as_pointer<uint8_t>(std::get<0>(t0));
  std::tie(std::ignore, a.t0_sample, a.t0_token) = t0;
  std::tie(a.samples, a.tokens, a.width, a.chunk) = sizes;
  a.tanh = tanh;
  return a;
}

// x alone: norm_modulate; u without y: gate_residual; both: the two in one pass.
inline NormArgs norm_forward_args(const Rows& x, const Rows& u, const ThreeRows& rows,
                                  const ThreeRows& rows_t0, const T0& t0, uintptr_t y,
                                  uintptr_t out, uintptr_t mean, uintptr_t rstd, const Fp8& fp8,
                                  const NormSizes& sizes, bool tanh, double eps) {
  NormArgs a = norm_args(rows, rows_t0, t0, sizes, tanh);
  a.x = address_of(x);
  a.u = address_of(u);
  a.x_dtype = dtype_of(x);
  a.u_dtype = dtype_of(u);
  a.y = as_pointer(y);
  a.out = as_pointer(out);
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
  a.fp8 = fp8_out(fp8);
  a.eps = (float)eps;
  return a;
}

// grads: dy, dout; partial: addresses of the chunks' sums, for the rows and for rows_t0, 0 where
// not wanted.
inline NormArgs norm_backward_args(const std::array<Rows, 2>& grads, const Rows& x, const Rows& u,
                                   uintptr_t mean, uintptr_t rstd, const ThreeRows& rows,
                                   const ThreeRows& rows_t0, const T0& t0, uintptr_t dx,
                                   uintptr_t du, const std::array<ThreeAddresses, 2>& partial,
                                   const NormSizes& sizes, bool tanh) {
  NormArgs a = norm_args(rows, rows_t0, t0, sizes, tanh);
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
  return a;
}

// What is left to do for every sum that is wanted.
inline std::vector<NormFinishArgs> norm_finish_args(const NormArgs& a,
                                                    const std::array<ThreeAddresses, 2>& sums) {
  std::vector<NormFinishArgs> all;
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) {
      if (sums[k][r] == 0) continue;
      NormFinishArgs f{};
      f.partial = a.partial[k][r];
      f.out = as_pointer<float>(sums[k][r]);
      if (r == kGate && a.tanh) f.gate = a.rows[k][r];
      f.samples = a.samples;
      f.chunks = norm_chunks(a);
      f.width = a.width;
      all.push_back(f);
    }
  }
  return all;
}

}  // namespace qirl
