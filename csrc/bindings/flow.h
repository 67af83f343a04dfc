// Arguments of the flow kernels from what Python passes, for _cpu and _cuda alike.
#pragma once

#include "bindings/bind.h"

namespace qirl {

// Args: FlowArgs or cuda::FlowArgs.
template <class Args>
Args flow_args(const Array& x, const Array& v, const Array& delta, const Array& a_B,
               const Array& c_B, const Array& w_B) {
  Args args{};
  args.x = x.data;
  args.v = v.data;
  args.delta = delta.data;
  args.x_stride = x.stride[0];
  args.v_stride = v.stride[0];
  args.delta_stride = delta.stride[0];
  args.x_dtype = x.dtype();
  args.v_dtype = v.dtype();
  args.delta_dtype = delta.dtype();
  args.a_B = as_pointer<float>(a_B);
  args.c_B = as_pointer<float>(c_B);
  args.w_B = as_pointer<float>(w_B);
  args.row_size = x.row_size();
  return args;
}

}  // namespace qirl
