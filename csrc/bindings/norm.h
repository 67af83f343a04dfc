// How norm_modulate and the gated residuals cross from Python, for the CPU and the GPU alike.
#pragma once

#include <pybind11/stl.h>

#include <array>
#include <vector>

#include "bindings/bind.h"
#include "math/norm_args.h"

namespace qirl {

using ThreeRows = std::array<Array, kNormRows>;  // gate, scale, shift

inline NormRow norm_row(const Array& r) { return {r.data, r.stride[0], r.dtype()}; }

// x: a tensor [samples, tokens, width]. chunk: tokens of one sample that a task takes.
inline NormArgs norm_args(const Array& x, const ThreeRows& rows, const ThreeRows& rows_t0,
                          const Array& t0, int64_t chunk, bool tanh) {
  NormArgs a{};
  for (int k = 0; k < kNormRows; ++k) {
    a.rows[0][k] = norm_row(rows[k]);
    a.rows[1][k] = norm_row(rows_t0[k]);
  }
  a.t0 = as_pointer<uint8_t>(t0);
  a.t0_sample = t0.stride[0];
  a.t0_token = t0.stride[1];
  a.samples = x.size[0];
  a.tokens = x.size[1];
  a.width = x.size[2];
  a.chunk = chunk;
  a.tanh = tanh;
  return a;
}

// x alone: norm_modulate; u without y: gate_residual; both: the two in one pass.
inline NormArgs norm_forward_args(const Array& x, const Array& u, const ThreeRows& rows,
                                  const ThreeRows& rows_t0, const Array& t0, const Array& y,
                                  const Array& out, const Array& mean, const Array& rstd,
                                  const Fp8& fp8, int64_t chunk, bool tanh, double eps) {
  NormArgs a = norm_args(x, rows, rows_t0, t0, chunk, tanh);
  a.x = x.data;
  a.u = u.data;
  a.x_dtype = x.dtype();
  a.u_dtype = u.dtype();
  a.y = as_pointer(y);
  a.out = as_pointer(out);
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
  a.fp8 = fp8_out(fp8);
  a.eps = (float)eps;
  return a;
}

// grads: dy, dout; partial: the chunks' sums, for the rows and for rows_t0, absent where not
// wanted.
inline NormArgs norm_backward_args(const std::array<Array, 2>& grads, const Array& x,
                                   const Array& u, const Array& mean, const Array& rstd,
                                   const ThreeRows& rows, const ThreeRows& rows_t0, const Array& t0,
                                   const Array& dx, const Array& du,
                                   const std::array<ThreeRows, 2>& partial, int64_t chunk,
                                   bool tanh) {
  const Array& given = grads[0].data ? grads[0] : grads[1];
  NormArgs a = norm_args(given, rows, rows_t0, t0, chunk, tanh);
  a.dy = grads[0].data;
  a.dout = grads[1].data;
  a.x = x.data;
  a.u = u.data;
  a.x_dtype = given.dtype();
  a.u_dtype = u.dtype();
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
                                                    const std::array<ThreeRows, 2>& sums) {
  std::vector<NormFinishArgs> all;
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) {
      if (sums[k][r].data == nullptr) continue;
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
