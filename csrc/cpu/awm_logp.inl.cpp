// awm_logp: sums of squares of v - (noise - x0), and the gradient.
#include "cpu/awm_logp.h"

#include "cpu/row_block.h"
#include "math/awm_logp.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// body(block, residual) for each task, residual(i, n) being that of elements [i, i + n).
template <class V, class Body>
QIRL_HD void all_blocks(const AwmArgs& args, int64_t begin, int64_t end, const V*, Body body) {
  for (int64_t task = begin; task < end; ++task) {
    const RowBlock block(args.row_size, task);
    const V* v = block.at<V>(args.v);
    const AnyBlock noise(args.noise, block), x0(args.x0, block);
    body(task, block, [&](int64_t i, int n) {
      return awm_residual(load_n(v + i, n), noise.load(i, n), x0.load(i, n));
    });
  }
}

}  // namespace

const char* awm_logp(const void* arguments, int64_t begin, int64_t end) {
  const AwmArgs& args = *(const AwmArgs*)arguments;
  with_storage_type(args.v.dtype, [&](auto* v) {
    all_blocks(args, begin, end, v, [&](int64_t task, const RowBlock& block, auto residual) {
      const BlockSums<1> sum(block.size, [&](int64_t i, int n, int64_t vector, Sum16* part) {
        const F r = residual(i, n);
        part->add(vector, r * r);
      });
      args.sums[task] = sum.total(0);
    });
  });
  return kIsaName;
}

const char* awm_logp_backward(const void* arguments, int64_t begin, int64_t end) {
  const AwmArgs& args = *(const AwmArgs*)arguments;
  with_storage_type(args.v.dtype, [&](auto* v) {
    all_blocks(args, begin, end, v, [&](int64_t, const RowBlock& block, auto residual) {
      const F slope = splat(args.grad_B[block.row] * args.slope_B[block.row]);
      auto* dv = (decltype(v))args.dv + block.out;
      for_vectors(block.size, [&](int64_t i, int n) {
        store_n(dv + i, round_as(dv, slope * residual(i, n)), n, args.stream);
      });
    });
  });
  if (args.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
