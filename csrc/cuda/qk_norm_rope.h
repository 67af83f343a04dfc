// Launchers of qk_norm_rope.cu.
#pragma once

#include "math/qk_args.h"

namespace qirl::cuda {

constexpr int64_t kQkMaxWidth = 256;  // and a multiple of 8

// Each returns a cudaError_t: 0, or why the launch failed.
int qk_norm_rope(const QkArgs& args, void* stream);
int qk_norm_rope_backward(const QkArgs& args, void* stream);

}  // namespace qirl::cuda
