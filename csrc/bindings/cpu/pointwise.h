// What the bindings of the pointwise kernels share.
#pragma once

#include <initializer_list>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"
#include "cpu/pointwise.h"

namespace qirl {

// Inputs of one dtype, contiguous outputs; fp8: the one output again.
inline void run_pointwise(const Kernel (&table)[kIsaCount], std::initializer_list<Rows> inputs,
                          std::initializer_list<uintptr_t> outputs, int64_t rows, int64_t width,
                          int threads, const Fp8& fp8 = {}) {
  PointwiseArgs a{};
  int count = 0;
  for (const Rows& in : inputs) {
    a.in[count] = address_of(in);
    a.in_stride[count++] = stride_of(in);
  }
  a.rows = rows;
  a.width = width;
  a.fp8 = fp8_out(fp8);
  a.block = a.fp8.q != nullptr && a.fp8.unit == width ? width : kPointwiseBlock;
  a.dtype = dtype_of(*inputs.begin());
  a.stream = true;
  count = 0;
  for (const uintptr_t out : outputs) {
    a.out[count] = as_pointer(out);
    a.stream = a.stream && worth_streaming(a.out[count++], width * dtype_bytes(a.dtype), rows);
  }
  const int64_t tasks = rows * ((width + a.block - 1) / a.block);
  const int64_t task_size = width < a.block ? width : a.block;
  py::gil_scoped_release released;
  run_kernel(table, &a, tasks, (4 * kPointwiseBlock + task_size - 1) / task_size, threads);
}

}  // namespace qirl
