// What the bindings of the pointwise kernels share.
#pragma once

#include <initializer_list>

#include "bindings/cuda/ops.h"
#include "cuda/pointwise.h"

namespace qirl::cuda {

// Inputs [rows, width] of one dtype, contiguous outputs; fp8: the one output again.
inline PointwiseArgs pointwise_args(std::initializer_list<Array> inputs,
                                    std::initializer_list<Array> outputs, const Fp8& fp8 = {}) {
  PointwiseArgs args{};
  args.dtype = inputs.begin()->dtype();
  int count = 0;
  for (const Array& in : inputs) {
    require_dtype(in, args.dtype);
    args.in[count] = in.data;
    args.in_stride[count++] = in.stride[0];
  }
  count = 0;
  for (const Array& out : outputs) args.out[count++] = as_pointer(out);
  args.rows = inputs.begin()->size[0];
  args.width = inputs.begin()->size[1];
  args.fp8 = fp8_out(fp8);
  return args;
}

}  // namespace qirl::cuda
