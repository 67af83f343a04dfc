// Arguments of the kernels that map elements to elements: gelu, swiglu and their gradients.
#pragma once

#include <stdint.h>

#include "math/fp8_out.h"

namespace qirl::cuda {

// As cpu/pointwise.h: row strides in elements, dense rows, contiguous outputs, one dtype.
struct PointwiseArgs {
  const void* in[3];
  void* out[2];
  int64_t in_stride[3];
  int64_t rows, width;
  Fp8Out fp8;  // out[0] again, where it is the only one
  int dtype;
};

}  // namespace qirl::cuda
