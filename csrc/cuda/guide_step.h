// Launcher of guide_step.cu.
#pragma once

#include "cuda/flow_step.h"

namespace qirl::cuda {

// As cpu/guide_step.h.
struct GuideStepArgs {
  FlowArgs flow;
  const void* u;
  const float* scale_B;
  void* delta_out;  // null: the guided velocity takes the step itself
  int64_t u_stride, width;
  bool rescale;
};

// A cudaError_t: 0, or why the launch failed.
int guide_step(const GuideStepArgs& args, void* stream);

}  // namespace qirl::cuda
