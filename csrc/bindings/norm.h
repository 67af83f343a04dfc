// How norm_modulate and the gated residuals cross from Python, for the CPU and the GPU alike.
#pragma once

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

// x alone: norm_modulate; u alone: backward of gate_residual; both: the others.
inline void norm_inputs(NormArgs& a, const Array& x, const Array& u) {
  a.x = x.data;
  a.u = u.data;
  a.x_dtype = x.dtype();
  a.u_dtype = u.dtype();
}

// dout absent, or dy: backward of gate_residual. The statistics are the forward's.
inline void norm_gradients(NormArgs& a, const Array& dy, const Array& dout, const Array& mean,
                           const Array& rstd) {
  a.dy = dy.data;
  a.dout = dout.data;
  a.x_dtype = (dy.data ? dy : dout).dtype();
  a.mean = as_pointer<float>(mean);
  a.rstd = as_pointer<float>(rstd);
}

// What is left to do for every sum that is wanted; `out`: where it goes, null elsewhere.
inline std::vector<NormFinishArgs> norm_finish_args(const NormArgs& a,
                                                    float* const (&out)[2][kNormRows]) {
  std::vector<NormFinishArgs> all;
  for (int k = 0; k < 2; ++k) {
    for (int r = 0; r < kNormRows; ++r) {
      if (out[k][r] == nullptr) continue;
      NormFinishArgs f{};
      f.partial = a.partial[k][r];
      f.out = out[k][r];
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
