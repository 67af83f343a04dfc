// What the bindings of the pointwise kernels share.
#pragma once

#include <initializer_list>

#include "bindings/cuda/ops.h"
#include "cuda/pointwise.h"

namespace qirl::cuda {

// Inputs of one dtype, contiguous outputs; fp8: the one output again.
inline PointwiseArgs pointwise_args(std::initializer_list<Rows> inputs,
                                    std::initializer_list<uintptr_t> outputs, int64_t rows,
                                    int64_t width, const Fp8& fp8 = {}) {
  PointwiseArgs args{};
  int count = 0;
  for (const Rows& in : inputs) {
    args.in[count] = address_of(in);
    args.in_stride[count++] = stride_of(in);
  }
  count = 0;
  for (const uintptr_t out : outputs) args.out[count++] = as_pointer(out);
  args.rows = rows;
  args.width = width;
  args.fp8 = fp8_out(fp8);
  args.dtype = dtype_of(*inputs.begin());
  return args;
}

}  // namespace qirl::cuda
