// What the bindings of the pointwise kernels share.
#pragma once

#include <initializer_list>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"
#include "cpu/pointwise.h"

namespace qirl {

// Inputs [rows, width] of one dtype, contiguous outputs; fp8: the one output again.
inline void run_pointwise(const Kernel (&table)[kIsaCount], std::initializer_list<Array> inputs,
                          std::initializer_list<Array> outputs, int threads, const Fp8& fp8 = {}) {
  const int64_t rows = inputs.begin()->size[0], width = inputs.begin()->size[1];
  PointwiseArgs a{};
  int count = 0;
  for (const Array& in : inputs) {
    a.in[count] = in.data;
    a.in_stride[count++] = in.stride[0];
  }
  a.rows = rows;
  a.width = width;
  a.fp8 = fp8_out(fp8);
  a.block = a.fp8.q != nullptr && a.fp8.unit == width ? width : kPointwiseBlock;
  a.dtype = inputs.begin()->dtype();
  a.stream = true;
  count = 0;
  for (const Array& out : outputs) {
    a.out[count] = as_pointer(out);
    a.stream = a.stream && worth_streaming(a.out[count++], width * dtype_bytes(a.dtype), rows);
  }
  const int64_t tasks = rows * ((width + a.block - 1) / a.block);
  const int64_t task_size = width < a.block ? width : a.block;
  py::gil_scoped_release released;
  run_kernel(table, &a, tasks, (4 * kPointwiseBlock + task_size - 1) / task_size, threads);
}

}  // namespace qirl
