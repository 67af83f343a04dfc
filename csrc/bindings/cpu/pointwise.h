// What the bindings of the pointwise kernels share.
#pragma once

#include <initializer_list>
#include <string>

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "cpu/dtype.h"
#include "cpu/pointwise.h"

namespace qirl {

// Inputs of one dtype and shape [..., width], read as one row where all are contiguous and no row
// has a scale of its own; outputs, and the first again in fp8: of the inputs' shape.
inline void run_pointwise(const Kernel (&table)[kIsaCount], std::initializer_list<Matrix> inputs,
                          std::initializer_list<Output> outputs, int threads,
                          const Fp8Out& fp8 = {}) {
  const Array& first = *inputs.begin();
  bool one_row = fp8.q == nullptr;
  for (const Array& in : inputs) one_row = one_row && in.dense;
  PointwiseArgs a{};
  a.dtype = first.dtype();
  a.rows = one_row ? 1 : first.count / first.last;
  a.width = first.count / a.rows;
  int count = 0;
  for (const Array& in : inputs) {
    require_dtype(in, a.dtype);
    a.in[count] = in.data;
    a.in_stride[count++] = one_row ? a.width : in.step;
  }
  a.fp8 = fp8;
  a.block = fp8.q != nullptr && fp8.unit == a.width ? a.width : kPointwiseBlock;
  a.stream = true;
  count = 0;
  for (const Output& out : outputs) {
    a.out[count++] = out.data;
    a.stream = a.stream && worth_streaming(out.data, a.width * dtype_bytes(a.dtype), a.rows);
  }
  const int64_t tasks = a.rows * ((a.width + a.block - 1) / a.block);
  const int64_t task_size = a.width < a.block ? a.width : a.block;
  py::gil_scoped_release released;
  run_kernel(table, &a, tasks, (4 * kPointwiseBlock + task_size - 1) / task_size, threads);
}

// y, and y in fp8: what an op with quantize= gives.
inline py::tuple run_quantizing(const Kernel (&table)[kIsaCount],
                                std::initializer_list<Matrix> inputs, const std::string& quantize,
                                int threads) {
  const Array& first = *inputs.begin();
  const Output y = output_like(first, first.dtype());
  const Fp8Outputs fp8(sizes_of(first), quantize);
  run_pointwise(table, inputs, {y}, threads, fp8.out);
  return py::make_tuple(y.tensor, fp8.q.tensor, fp8.scale.tensor);
}

}  // namespace qirl
