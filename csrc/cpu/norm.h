// norm_modulate and the gated residuals, see norm_forward.inl.cpp and norm_backward.inl.cpp.
#pragma once

#include "cpu/isa.h"
#include "math/norm_args.h"

namespace qirl {

// A task of norm_finish is one block of columns of one sample, one of the others a chunk of tokens.
constexpr int64_t kNormColumns = 512;

}  // namespace qirl

QIRL_CPU_KERNEL(norm_modulate)
QIRL_CPU_KERNEL(gate_residual)
QIRL_CPU_KERNEL(gate_residual_norm_modulate)
QIRL_CPU_KERNEL(norm_modulate_backward)
QIRL_CPU_KERNEL(gate_residual_backward)
QIRL_CPU_KERNEL(gate_residual_norm_modulate_backward)
QIRL_CPU_KERNEL(norm_finish)
