// What the bindings of the losses share.
#pragma once

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "bindings/operand.h"
#include "cpu/dtype.h"
#include "math/rows.h"

namespace qirl {

constexpr int64_t kRowGrain = 16;  // blocks a thread should at least have

// Sum of `count` block sums that lie `step` apart, in float64 in the order of the blocks.
inline double ordered_sum(const float* sums, int64_t count, int64_t step = 1) {
  double sum = 0.0;
  for (int64_t block = 0; block < count; ++block) sum += sums[block * step];
  return sum;
}

}  // namespace qirl
