// Launchers of awm_logp.cu: raw pointers, sizes, strides and a stream; no CUDA or torch types.
#pragma once

#include "math/awm_logp.h"
#include "math/rows.h"

namespace qirl::cuda {

struct AwmArgs {
  Operand v, noise, x0;
  const float* time_B;   // forward
  const float* grad_B;   // backward
  const float* slope_B;  // backward
  float* sums;           // forward: scratch [B, blocks a row]
  float* logp_B;         // forward
  float* slope_out_B;    // forward
  void* dv;              // backward: contiguous, dtype of v
  AwmForm form;
  int64_t rows, row_size;
};

// Each returns a cudaError_t: 0, or why the launch failed.
int awm_logp(const AwmArgs& args, void* stream);
int awm_logp_backward(const AwmArgs& args, void* stream);

}  // namespace qirl::cuda
