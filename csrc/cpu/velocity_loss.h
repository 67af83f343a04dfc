// Arguments of the velocity_loss kernel, see velocity_loss.inl.cpp.
#pragma once

#include "cpu/isa.h"
#include "math/rows.h"

namespace qirl {

// B rows of row_size elements; a task is one block of kRowBlock elements of one row.
struct VelocityArgs {
  Operand v, target;
  const float* weight_B;  // null: 1
  float* sums;            // [B, blocks a row]: sum of (v - target)^2 of each block
  void* dv;               // contiguous, dtype of v; null: not wanted
  int64_t rows, row_size;
  bool stream;
};

}  // namespace qirl

QIRL_CPU_KERNEL(velocity_loss)
