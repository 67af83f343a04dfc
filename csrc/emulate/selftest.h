// Kernels that are wrong on purpose, and the shared helpers on their own: see
// tests/ops/test_emulator.
#pragma once

#include <stdint.h>

namespace qirl::emulate {

// What a launch of the named kernel returned; out has room for 1024 values. -1: no such kernel.
int selftest(const char* name, float* out);

}  // namespace qirl::emulate
