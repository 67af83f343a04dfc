// What the flow_step, flow_logp and guide_step bindings share.
#pragma once

#include "bindings/cuda/ops.h"
#include "bindings/flow.h"
#include "cuda/flow_step.h"

namespace qirl::cuda {

using Coefficients = std::tuple<Whole, Whole, Whole, Whole>;  // a, c, w, b

inline FlowArgs flow_inputs(const Array& x, const Array& v, const Array& delta,
                            const Coefficients& coefficients) {
  const auto [a, c, w, b] = coefficients;
  FlowArgs args = flow_args<FlowArgs>(x, v, delta, a, c, w);
  args.b_B = as_pointer<float>(b);
  args.rows = x.rows();
  return args;
}

}  // namespace qirl::cuda
