// Arguments of the fp8_quantize kernels, see fp8_quantize.inl.cpp.
#pragma once

#include "cpu/isa.h"

namespace qirl {

enum Fp8Format : int { kE4m3fn = 0, kE5m2 = 1 };

// x: [rows, width] with a row stride (in elements) and dense rows. q: [rows, width] bytes or, when
// transposed, [width, rows]; the scales run along the rows of q, one for every `unit` elements.
struct Fp8Args {
  const void* x;
  uint8_t* q;
  float* scale;    // [rows of q, ceil(row length of q / unit)], or [1] when `whole`
  uint32_t* amax;  // fp8_amax: one a row of x, the bits of its largest finite |x|
  int64_t x_stride, rows, width, unit;
  int dtype, format;
  bool whole;  // one scale, already there
};

// fp8_quantize: a task is a row of x; transposed: kFp8Columns columns of x.
constexpr int64_t kFp8Columns = 64;

}  // namespace qirl

QIRL_CPU_KERNEL(fp8_amax)
QIRL_CPU_KERNEL(fp8_quantize)
QIRL_CPU_KERNEL(fp8_quantize_transposed)
