// Arguments of the flow_step and flow_logp kernels.
#pragma once

#include "cpu/isa.h"

namespace qirl {

// B rows of row_size elements. Inputs have row strides (in elements) and dense rows, outputs are
// contiguous. A task is one block of kFlowBlock elements of one row.
struct FlowArgs {
  const void* x;
  const void* v;
  const void* delta;  // null: zero
  const void* x_next_in;
  void* x_next_out;
  const float* a_B;
  const float* c_B;
  const float* s_B;
  const float* w_B;
  const int64_t* seed_B;
  const float* grad_B;
  float* sums;      // [B, blocks a row]: sum of r^2 of each block
  float* residual;  // [B, row_size]; null: not kept
  void* dv;         // null: not wanted
  void* dx;         // null: not wanted
  int64_t offset, row_size;
  int64_t x_stride, v_stride, delta_stride, x_next_stride;
  int x_dtype, v_dtype, delta_dtype;
  bool stream;
};

constexpr int64_t kFlowBlock = 1024;

}  // namespace qirl

QIRL_CPU_KERNEL(flow_step)
QIRL_CPU_KERNEL(flow_logp)
QIRL_CPU_KERNEL(flow_logp_backward)
