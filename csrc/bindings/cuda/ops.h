// The op bindings of _cuda.
#pragma once

#include "bindings/bind.h"

namespace qirl::cuda {

// Throws RuntimeError with the text of a cudaError_t other than success.
void check(const char* op, int error);

}  // namespace qirl::cuda
