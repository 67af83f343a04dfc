// What the flow_step, flow_logp and guide_step bindings share.
#pragma once

#include "bindings/cuda/ops.h"
#include "cuda/flow_step.h"

namespace qirl::cuda {

using Coefficients = std::tuple<Whole, Whole, Whole, Whole>;  // a, c, w, b

inline FlowArgs flow_inputs(const Array& x, const Array& v, const Array& delta,
                            const Coefficients& coefficients) {
  const auto [a, c, w, b] = coefficients;
  FlowArgs args{};
  args.x = x.data;
  args.v = v.data;
  args.delta = delta.data;
  args.x_stride = x.stride[0];
  args.v_stride = v.stride[0];
  args.delta_stride = delta.stride[0];
  args.x_dtype = x.dtype();
  args.v_dtype = v.dtype();
  args.delta_dtype = delta.dtype();
  args.a_B = as_pointer<float>(a);
  args.c_B = as_pointer<float>(c);
  args.w_B = as_pointer<float>(w);
  args.b_B = as_pointer<float>(b);
  args.rows = x.rows();
  args.row_size = x.row_size();
  return args;
}

}  // namespace qirl::cuda
