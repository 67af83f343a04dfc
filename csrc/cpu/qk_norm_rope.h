// Limits of the qk_norm_rope kernels, see qk_norm_rope.inl.cpp; a task is one chunk.
#pragma once

#include "cpu/isa.h"
#include "math/qk_args.h"

namespace qirl {

constexpr int64_t kQkMaxWidth = 1024;

}  // namespace qirl

QIRL_CPU_KERNEL(qk_norm_rope)
QIRL_CPU_KERNEL(qk_norm_rope_backward)
