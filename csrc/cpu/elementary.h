// Arguments of the elementary kernel, see elementary.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

enum ElementaryFunction : int { kExp, kLog, kTanh, kSigmoid };

// y = function(x) for `size` contiguous floats. `scalar` takes the formulas' one-number form, which
// is what the device compiles.
struct ElementaryArgs {
  const float* x;
  float* y;
  int function;
  bool scalar;
};

}  // namespace qirl

QIRL_CPU_KERNEL(elementary)
