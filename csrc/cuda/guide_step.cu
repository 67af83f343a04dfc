// guide_step on the GPU: guide and flow_step in one pass, with the bits of the two one after the
// other. With rescale a CTA first finds the factors of the tokens that its block touches, 16 lanes
// a token as in guide.cu; a token that two blocks share is summed by both.
#include "cuda/guide_step.h"

#include "cuda/flow_block.cuh"
#include "cuda/guide_sums.cuh"

namespace qirl::cuda {
namespace {

constexpr int kTokensAtOnce = kThreads / kTokenLanes;
constexpr int kMostTokens = kBlock + 1;  // tokens of one element

template <class X, class V, bool kRescale>
__global__ void __launch_bounds__(kThreads) guide_step_kernel(GuideStepArgs g, unsigned per_row) {
  const FlowArgs& args = g.flow;
  const int64_t row = blockIdx.x / per_row;
  const int64_t first = (int64_t)(blockIdx.x % per_row) * kBlock;
  const int64_t start = first + threadIdx.x * kPerThread, left = args.row_size - start;
  const V* c_row = (const V*)args.v + row * args.v_stride;
  const V* u_row = (const V*)g.u + row * g.u_stride;
  const float w = g.scale_B[row];
  float x[kPerThread], v[kPerThread], u[kPerThread], mean[kPerThread], x_next[kPerThread];
  load_vec_n((const X*)args.x + row * args.x_stride + start, left, x);
  load_vec_n(c_row + start, left, v);
  load_vec_n(u_row + start, left, u);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) u[k] = guide_combine(v[k], u[k], w);
  if constexpr (kRescale) {
    __shared__ float factors[kMostTokens];
    const int64_t last = first + kBlock < args.row_size ? first + kBlock : args.row_size;
    const int64_t token = first / g.width;  // the first one touched
    const int count = (int)((last + g.width - 1) / g.width - token);
    for (int t = 0; t < count; t += kTokensAtOnce) {  // all threads alike: the sums shuffle
      const int mine = t + (int)threadIdx.x / kTokenLanes;
      const int64_t at = mine < count ? (token + mine) * g.width : 0;
      float sums[2];
      token_sums<false>(c_row + at, u_row + at, (const V*)nullptr, mine < count ? g.width : 0, w,
                        sums);
      if (mine < count && threadIdx.x % kTokenLanes == 0) {
        factors[mine] = guide_factor(sums[0], sums[1], exact_sqrt);
      }
    }
    __syncthreads();
    if (left > 0) {
      int64_t own = start / g.width, rest = start - own * g.width;
#pragma unroll
      for (int k = 0; k < kPerThread; ++k) {
        if (k < left) u[k] *= factors[own - token];
        if (++rest == g.width) {
          rest = 0;
          ++own;
        }
      }
    }
  }
  const float a = args.a_B[row], c = args.c_B[row];
  if (g.delta_out == nullptr) {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) mean[k] = flow_mean(x[k], round_as<V>(u[k]), 0.0f, a, c);
  } else {
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) {
      u[k] = round_as<X>(c * (round_as<V>(u[k]) - v[k]));
      mean[k] = flow_mean(x[k], v[k], u[k], a, c);
    }
    store_vec_n((X*)g.delta_out + row * args.row_size + start, left, u);
  }
  draw<X>(args, row, start, left, mean, x_next);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) mean[k] = flow_residual(x_next[k], mean[k]);
  add_squares(args, blockIdx.x, left, mean);
}

}  // namespace

int guide_step(const GuideStepArgs& g, void* stream) {
  const FlowArgs& args = g.flow;
  const int64_t per_row = blocks_per_row(args);
  const int error = with_storage_types({args.x_dtype, args.v_dtype}, [&](auto x, auto v) {
    using X = typename decltype(x)::type;
    using V = typename decltype(v)::type;
    return launch(g.rescale ? guide_step_kernel<X, V, true> : guide_step_kernel<X, V, false>,
                  args.rows * per_row, kThreads, stream, g, (unsigned)per_row);
  });
  return error != 0 ? error : finish_log_prob(args, stream);
}

}  // namespace qirl::cuda
