// Kernels of gelu (in: x; out: y) and its gradient (in: dy, x; out: dx), see gelu.inl.cpp.
#pragma once

#include "cpu/pointwise.h"

QIRL_CPU_KERNEL(gelu)
QIRL_CPU_KERNEL(gelu_backward)
