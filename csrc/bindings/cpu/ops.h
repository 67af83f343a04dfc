// The op bindings of _cpu.
#pragma once

#include "bindings/bind.h"
#include "cpu/dtype.h"

namespace qirl {

// Throws ValueError naming the first row whose coefficient is not finite.
void require_finite(const char* op, const char* name, const float* values_B, int64_t rows);

}  // namespace qirl
