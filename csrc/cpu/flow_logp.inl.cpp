// flow_logp: score a stored step again, with the formulas and the order of sums of flow_step.
#include "cpu/flow_step.h"

#include "cpu/flow_block.h"
#include "cpu/vec.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <class T>
QIRL_HD void store_scaled(void* out, int64_t at, const T*, F value, int n, bool stream) {
  T* p = (T*)out + at;
  store_n(p, round_as(p, value), n, stream);
}

}  // namespace

const char* flow_logp(const void* arguments, int64_t begin, int64_t end) {
  const FlowArgs& args = *(const FlowArgs*)arguments;
  with_storage_types(args, [&](auto* x, auto* v) {
    for (int64_t task = begin; task < end; ++task) {
      const auto block = block_of(args, task, x, v);
      const auto* x_next =
          (decltype(x))args.x_next_in + block.row * args.x_next_stride + block.first;
      float* kept = args.residual ? args.residual + block.out : nullptr;
      Sum16 sum;
      for_vectors(block.size, [&](int64_t i, int n) {
        const F r = flow_residual(load_n(x_next + i, n), block.mean(i, n));
        if (kept) store_n(kept + i, r, n, /*stream=*/false);  // the gradient reads it soon
        sum.add(i / kLanes, r * r);
      });
      args.sums[task] = sum.total();
    }
  });
  return kIsaName;
}

const char* flow_logp_backward(const void* arguments, int64_t begin, int64_t end) {
  const FlowArgs& args = *(const FlowArgs*)arguments;
  with_storage_types(args, [&](auto* x, auto* v) {
    for (int64_t task = begin; task < end; ++task) {
      const auto block = block_of(args, task, x, v);
      const float grad = args.grad_B[block.row], w = args.w_B[block.row];
      const F slope_v = splat(flow_log_prob_slope(grad, w, args.c_B[block.row], args.row_size));
      const F slope_x = splat(flow_log_prob_slope(grad, w, args.a_B[block.row], args.row_size));
      for_vectors(block.size, [&](int64_t i, int n) {
        const F r = load_n(args.residual + block.out + i, n);
        if (args.dv) store_scaled(args.dv, block.out + i, v, slope_v * r, n, args.stream);
        if (args.dx) store_scaled(args.dx, block.out + i, x, slope_x * r, n, args.stream);
      });
    }
  });
  if (args.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
