// Arguments of the awm_logp kernels, see awm_logp.inl.cpp.
#pragma once

#include "cpu/isa.h"
#include "math/rows.h"

namespace qirl {

// B rows of row_size elements; a task is one block of kRowBlock elements of one row.
struct AwmArgs {
  Operand v, noise, x0;
  float* sums;           // forward: [B, blocks a row], sum of r^2 of each block
  const float* grad_B;   // backward
  const float* slope_B;  // backward
  void* dv;              // backward: contiguous, dtype of v
  int64_t row_size;
  bool stream;
};

}  // namespace qirl

QIRL_CPU_KERNEL(awm_logp)
QIRL_CPU_KERNEL(awm_logp_backward)
