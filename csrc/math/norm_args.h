// What the launchers of norm_modulate and the gated residuals take, on the CPU and on the GPU.
#pragma once

#include "math/fp8_out.h"
#include "math/portable.h"

namespace qirl {

// One row of `width` values a sample; p null: absent.
struct NormRow {
  const void* p;
  int64_t stride;
  int dtype;
};

// Which of the rows (and of the sums over tokens, which mirror them) an array's element is.
enum NormRowName : int { kGate, kScale, kShift, kNormRows };

// Large tensors are dense [samples, tokens, width]. rows[1] is for the tokens that t0 marks.
struct NormArgs {
  const void* x;     // forward: residual or x; backward: out or x
  const void* u;     // gated only
  const void* dy;    // backward of a norm
  const void* dout;  // backward of a gate; null with a norm: absent
  void* y;           // forward: of the norm; backward: dx or dresidual
  void* out;         // forward: residual + f u; backward: du, null: not wanted
  Fp8Out fp8;        // forward of a norm: y again
  float* mean;       // [samples, tokens]; null for RMSNorm
  float* rstd;
  NormRow rows[2][kNormRows];
  float* partial[2][kNormRows];  // backward: [samples, chunks, width]; null: not wanted
  const uint8_t* t0;             // null: no token is marked
  int64_t t0_sample, t0_token;   // its strides
  int64_t samples, tokens, width;
  int64_t chunk;  // tokens of one sample whose sums are made together
  float eps;
  int x_dtype, u_dtype;  // y, dy, dout are as x (dout as x_dtype where there is no norm)
  bool tanh;
  bool stream;  // CPU: stores that bypass the caches
};

QIRL_HD int64_t norm_chunks(const NormArgs& a) { return (a.tokens + a.chunk - 1) / a.chunk; }

// Adds the chunks' partial sums; with a gate row, times the slope of tanh there.
struct NormFinishArgs {
  const float* partial;
  float* out;
  NormRow gate;
  int64_t samples, chunks, width;
};

}  // namespace qirl
