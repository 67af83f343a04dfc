// Launchers of gelu.cu. Each returns a cudaError_t: 0, or why the launch failed.
#pragma once

#include "cuda/pointwise.h"

namespace qirl::cuda {

int gelu(const PointwiseArgs& args, void* stream);           // in: x; out: y
int gelu_backward(const PointwiseArgs& args, void* stream);  // in: dy, x; out: dx

}  // namespace qirl::cuda
