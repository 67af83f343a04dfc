// What the flow_step and flow_logp bindings share.
#pragma once

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "bindings/flow.h"
#include "cpu/flow_step.h"

namespace qirl {

constexpr int64_t kFlowGrain = 16;  // blocks a thread should at least have

// The inputs common to all flow kernels, their coefficients checked.
FlowArgs flow_inputs(const char* op, const Array& x, const Array& v, const Array& delta,
                     const Array& a_B, const Array& c_B, const Array& w_B);

int64_t flow_tasks(int64_t rows, int64_t row_size);

// logp_B from the block sums, added in float64 in the order of the blocks.
void finish_log_prob(const FlowArgs& args, const float* b_B, float* logp_B, int64_t rows);

}  // namespace qirl
