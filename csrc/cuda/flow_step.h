// Launchers of flow_step.cu: raw pointers, sizes, strides and a stream; no CUDA or torch types.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// As cpu/flow_step.h: B rows of row_size elements, row strides in elements, outputs contiguous.
struct FlowArgs {
  const void* x;
  const void* v;
  const void* delta;      // null: zero
  const void* x_next_in;  // flow_logp
  void* x_next_out;       // flow_step
  const float* a_B;
  const float* c_B;
  const float* s_B;
  const float* w_B;
  const float* b_B;
  const int64_t* seed_B;
  const float* grad_B;
  float* sums;      // scratch [B, blocks a row]
  float* residual;  // [B, row_size]; null: not kept
  float* logp_B;
  void* dv;  // null: not wanted
  void* dx;  // null: not wanted
  int64_t offset, rows, row_size;
  int64_t x_stride, v_stride, delta_stride, x_next_stride;
  int x_dtype, v_dtype, delta_dtype;
};

// Each returns a cudaError_t: 0, or why the launch failed.
int flow_step(const FlowArgs& args, void* stream);
int flow_logp(const FlowArgs& args, void* stream);
int flow_logp_backward(const FlowArgs& args, void* stream);

}  // namespace qirl::cuda
