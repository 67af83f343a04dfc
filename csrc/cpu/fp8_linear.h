// Arguments of the fp8_linear kernel, see fp8_linear.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

// out [rows, width] = q [rows, width] times its scale; all dense.
struct Fp8WidenArgs {
  const uint8_t* q;
  const float* scale;  // [rows, ceil(width / unit)], or [1] when `whole`
  float* out;
  int64_t rows, width, unit;
  bool e5m2, whole;
};

}  // namespace qirl

QIRL_CPU_KERNEL(fp8_widen)
