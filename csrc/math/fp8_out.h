// Where a kernel puts its result y in 8-bit floats (e4m3fn), beside y itself.
#pragma once

#include <stdint.h>

namespace qirl {

constexpr int64_t kFp8Block = 128;  // elements of a row that share a scale, granularity "block"

// q: [rows, width] bytes, contiguous; scale: [rows, ceil(width / unit)]. q null: not wanted.
struct Fp8Out {
  uint8_t* q;
  float* scale;
  int64_t unit;  // elements of a row that share a scale: the width, or kFp8Block
};

}  // namespace qirl
