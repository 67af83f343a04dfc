// flow_step, flow_logp and its gradient on the GPU, from the formulas of csrc/math/.
#include "cuda/flow_step.h"

#include "cuda/flow_block.cuh"

namespace qirl::cuda {
namespace {

// mean[k] of element start + k of a row; `left` elements of the row begin at start.
template <class X, class V>
__device__ __forceinline__ void means_at(const FlowArgs& args, int64_t row, int64_t start,
                                         int64_t left, float (&mean)[kPerThread]) {
  float x[kPerThread], v[kPerThread], delta[kPerThread] = {};
  load_vec_n((const X*)args.x + row * args.x_stride + start, left, x);
  load_vec_n((const V*)args.v + row * args.v_stride + start, left, v);
  if (args.delta) {
    const int64_t at = row * args.delta_stride + start;
    if (args.delta_dtype == 0) {
      load_vec_n((const float*)args.delta + at, left, delta);
    } else {
      load_vec_n((const bf16*)args.delta + at, left, delta);
    }
  }
  const float a = args.a_B[row], c = args.c_B[row];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) mean[k] = flow_mean(x[k], v[k], delta[k], a, c);
}

template <class X, class V, bool kReplay>
__global__ void __launch_bounds__(kThreads) score_kernel(FlowArgs args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row;
  const int64_t start = (int64_t)(blockIdx.x % per_row) * kBlock + threadIdx.x * kPerThread;
  const int64_t left = args.row_size - start;
  float mean[kPerThread], x_next[kPerThread], r[kPerThread];
  means_at<X, V>(args, row, start, left, mean);
  if constexpr (kReplay) {
    load_vec_n((const X*)args.x_next_in + row * args.x_next_stride + start, left, x_next);
  } else {
    draw<X>(args, row, start, left, mean, x_next);
  }
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) r[k] = flow_residual(x_next[k], mean[k]);
  if (kReplay && args.residual) store_vec_n(args.residual + row * args.row_size + start, left, r);
  add_squares(args, blockIdx.x, left, r);
}

template <class X, class V>
__global__ void __launch_bounds__(kThreads) backward_kernel(FlowArgs args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row;
  const int64_t start = (int64_t)(blockIdx.x % per_row) * kBlock + threadIdx.x * kPerThread;
  const int64_t left = args.row_size - start;
  const float grad = args.grad_B[row], w = args.w_B[row];
  const float slope_v = flow_log_prob_slope(grad, w, args.c_B[row], args.row_size);
  const float slope_x = flow_log_prob_slope(grad, w, args.a_B[row], args.row_size);
  float r[kPerThread], out[kPerThread];
  load_vec_n(args.residual + row * args.row_size + start, left, r);
  if (args.dv) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = slope_v * r[k];
    store_vec_n((V*)args.dv + row * args.row_size + start, left, out);
  }
  if (args.dx) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) out[k] = slope_x * r[k];
    store_vec_n((X*)args.dx + row * args.row_size + start, left, out);
  }
}

template <bool kReplay>
int score(const FlowArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args);
  const int error = with_storage_types({args.x_dtype, args.v_dtype}, [&](auto x, auto v) {
    using X = typename decltype(x)::type;
    using V = typename decltype(v)::type;
    return launch(score_kernel<X, V, kReplay>, args.rows * per_row, kThreads, stream, args,
                  (unsigned)per_row);
  });
  return error != 0 ? error : finish_log_prob(args, stream);
}

}  // namespace

int flow_step(const FlowArgs& args, void* stream) { return score<false>(args, stream); }

int flow_logp(const FlowArgs& args, void* stream) { return score<true>(args, stream); }

int flow_logp_backward(const FlowArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args);
  return with_storage_types({args.x_dtype, args.v_dtype}, [&](auto x, auto v) {
    using X = typename decltype(x)::type;
    using V = typename decltype(v)::type;
    return launch(backward_kernel<X, V>, args.rows * per_row, kThreads, stream, args,
                  (unsigned)per_row);
  });
}

}  // namespace qirl::cuda
