// Launchers of norm.cu. Each returns a cudaError_t: 0, or why the launch failed.
#pragma once

#include "math/norm_args.h"

namespace qirl::cuda {

// With a norm (args.y or args.dy) rows hold at most kNormWidest elements.
constexpr int64_t kNormWidest = 8192;

int norm_forward(const NormArgs& args, void* stream);
int norm_backward(const NormArgs& args, void* stream);
// `count` sums of one shape, from 1 to 2 kNormRows.
int norm_finish(const NormFinishArgs* sums, int count, void* stream);

}  // namespace qirl::cuda
