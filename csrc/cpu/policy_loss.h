// Arguments of the policy_loss kernel, see policy_loss.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

// `real` is double or float; vectors have `rows` contiguous elements, scalars one.
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

}  // namespace qirl

QIRL_CPU_KERNEL(policy_loss)
