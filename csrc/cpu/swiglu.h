// Kernels of swiglu (in: gate, up; out: y) and its gradient (in: dy, gate, up; out: dgate, dup),
// see swiglu.inl.cpp.
#pragma once

#include "cpu/pointwise.h"

QIRL_CPU_KERNEL(swiglu)
QIRL_CPU_KERNEL(swiglu_backward)
