// Launchers of swiglu.cu. Each returns a cudaError_t: 0, or why the launch failed.
#pragma once

#include "cuda/pointwise.h"

namespace qirl::cuda {

int swiglu(const PointwiseArgs& args, void* stream);           // in: gate, up; out: y
int swiglu_backward(const PointwiseArgs& args, void* stream);  // in: dy, gate, up; out: dgate, dup

}  // namespace qirl::cuda
