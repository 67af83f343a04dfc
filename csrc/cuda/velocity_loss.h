// Launcher of velocity_loss.cu: raw pointers, sizes, strides and a stream; no CUDA or torch types.
#pragma once

#include "math/rows.h"

namespace qirl::cuda {

struct VelocityArgs {
  Operand v, target;
  const float* weight_B;  // null: 1
  float* sums;            // scratch [B, blocks a row]
  double* terms_B;        // scratch [B]
  float* mse_B;
  float* loss;
  void* dv;  // contiguous, dtype of v; null: not wanted
  int64_t rows, row_size;
};

// A cudaError_t: 0, or why the launch failed.
int velocity_loss(const VelocityArgs& args, void* stream);

}  // namespace qirl::cuda
