// Launcher of policy_loss.cu: raw pointers, sizes and a stream; no CUDA or torch types.
#pragma once

#include <stdint.h>

namespace qirl::cuda {

// As cpu/policy_loss.h: `real` is double or float; vectors have `rows` contiguous elements.
struct PolicyArgs {
  const void* logp_B;       // real
  const void* logp_old_B;   // real
  const void* advantage_B;  // real
  void* loss;               // real
  void* ratio_B;            // real
  void* clip_fraction;      // real
  void* approx_kl;          // real
  void* grad_B;             // real: dloss/dlogp
  int64_t rows;
  double low, high;  // the clip interval of the ratio
  bool is_double;
};

// A cudaError_t: 0, or why the launch failed.
int policy_loss(const PolicyArgs& args, void* stream);

}  // namespace qirl::cuda
