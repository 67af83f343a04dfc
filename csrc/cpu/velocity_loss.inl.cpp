// velocity_loss: sums of squares and the gradient in one pass.
#include "cpu/velocity_loss.h"

#include "cpu/row_block.h"
#include "math/velocity_loss.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <bool kGradient, class V, class T>
QIRL_HD void all_blocks(const VelocityArgs& args, int64_t begin, int64_t end, const V*, const T*) {
  for (int64_t task = begin; task < end; ++task) {
    const RowBlock block(args.row_size, task);
    const V* v = block.at<V>(args.v);
    const T* target = block.at<T>(args.target);
    const float weight = args.weight_B ? args.weight_B[block.row] : 1.0f;
    const F slope = splat(velocity_slope(weight, args.row_size, args.rows));
    V* dv = (V*)args.dv + block.out;
    const BlockSums<1> sum(block.size, [&](int64_t i, int n, int64_t vector, Sum16* part) {
      const F r = velocity_error(load_n(v + i, n), load_n(target + i, n));
      part->add(vector, r * r);
      if (kGradient) store_n(dv + i, round_as(dv, slope * r), n, args.stream);
    });
    args.sums[task] = sum.total(0);
  }
}

}  // namespace

const char* velocity_loss(const void* arguments, int64_t begin, int64_t end) {
  const VelocityArgs& args = *(const VelocityArgs*)arguments;
  with_storage_type(args.v.dtype, [&](auto* v) {
    with_storage_type(args.target.dtype, [&](auto* target) {
      args.dv ? all_blocks<true>(args, begin, end, v, target)
              : all_blocks<false>(args, begin, end, v, target);
    });
  });
  if (args.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
