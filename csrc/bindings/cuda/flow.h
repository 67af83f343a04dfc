// What the flow_step, flow_logp and guide_step bindings share.
#pragma once

#include "bindings/cuda/ops.h"
#include "cuda/flow_step.h"

namespace qirl::cuda {

using Coefficients = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // a, c, w, b

inline FlowArgs flow_inputs(const Rows& x, const Rows& v, const Rows& delta,
                            const Coefficients& coefficients, int64_t rows, int64_t row_size) {
  const auto [a, c, w, b] = coefficients;
  FlowArgs args{};
  args.x = address_of(x);
  args.v = address_of(v);
  args.delta = address_of(delta);
  args.x_stride = stride_of(x);
  args.v_stride = stride_of(v);
  args.delta_stride = stride_of(delta);
  args.x_dtype = dtype_of(x);
  args.v_dtype = dtype_of(v);
  args.delta_dtype = dtype_of(delta);
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.b_B = as_pointer<float>(b);
  args.rows = rows;
  args.row_size = row_size;
  return args;
}

}  // namespace qirl::cuda
