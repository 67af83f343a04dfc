// Arguments of kernels that map elements to elements: gelu, swiglu and their gradients.
#pragma once

#include "cpu/isa.h"
#include "math/fp8_out.h"

namespace qirl {

// `rows` rows of `width` elements of one dtype; inputs have row strides (in elements) and dense
// rows, outputs are contiguous. A task is one block of `block` elements of one row.
struct PointwiseArgs {
  const void* in[3];
  void* out[2];
  int64_t in_stride[3];
  int64_t rows, width;
  int64_t block;
  Fp8Out fp8;  // out[0] again, where it is the only one; a block is then whole units of it
  int dtype;
  bool stream;
};

constexpr int64_t kPointwiseBlock = 4096;

}  // namespace qirl
