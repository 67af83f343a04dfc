// flow_step: one step of the sampler from a given velocity.
#include "cpu/flow_step.h"

#include "cpu/flow_sample.h"

namespace qirl {
namespace QIRL_ISA {

const char* flow_step(const void* arguments, int64_t begin, int64_t end) {
  const FlowArgs& args = *(const FlowArgs*)arguments;
  with_storage_types(args, [&](auto* x, auto* v) {
    for (int64_t task = begin; task < end; ++task) {
      const auto block = block_of(args, task, x, v);
      args.sums[task] =
          sample_block(args, block, [&](int64_t i, int n) { return block.mean(i, n); });
    }
  });
  if (args.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
