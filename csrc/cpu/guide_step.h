// Arguments of guide_step, see guide_step.inl.cpp.
#pragma once

#include "cpu/flow_step.h"

namespace qirl {

// flow.v is the conditional velocity, u the other, of its dtype; tokens are `width` wide.
struct GuideStepArgs {
  FlowArgs flow;
  const void* u;
  const float* scale_B;
  void* delta_out;  // as x; null: the guided velocity takes the step itself
  int64_t u_stride, width;
  bool rescale;
};

}  // namespace qirl

QIRL_CPU_KERNEL(guide_step)
