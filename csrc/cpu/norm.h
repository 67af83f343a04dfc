// Arguments of norm_modulate and the gated residuals, see norm_forward.inl.cpp, norm_backward.
#pragma once

#include "cpu/isa.h"

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
  float* mean;       // [samples, tokens]; null for RMSNorm
  float* rstd;
  NormRow rows[2][kNormRows];
  float* partial[2][kNormRows];  // backward: [samples, chunks, width]; null: not wanted
  const uint8_t* t0;             // null: no token is marked
  int64_t t0_sample, t0_token;   // its strides
  int64_t samples, tokens, width;
  float eps;
  int x_dtype, u_dtype;  // y, dy, dout are as x (dout as x_dtype where there is no norm)
  bool tanh, stream;
};

// A task is a chunk of kNormChunk tokens of one sample, fewer at its end.
constexpr int64_t kNormChunk = 64;

inline int64_t norm_chunks(int64_t tokens) { return (tokens + kNormChunk - 1) / kNormChunk; }

// Adds the chunks' partial sums in order; with a gate row, times 1 - tanh(gate)^2.
struct NormFinishArgs {
  const float* partial;
  float* out;
  NormRow gate;
  int64_t chunks, width;
};

// A task is one block of columns of one sample.
constexpr int64_t kNormColumns = 512;

}  // namespace qirl

QIRL_CPU_KERNEL(norm_modulate)
QIRL_CPU_KERNEL(gate_residual)
QIRL_CPU_KERNEL(gate_residual_norm_modulate)
QIRL_CPU_KERNEL(norm_modulate_backward)
QIRL_CPU_KERNEL(gate_residual_backward)
QIRL_CPU_KERNEL(gate_residual_norm_modulate_backward)
QIRL_CPU_KERNEL(norm_finish)
