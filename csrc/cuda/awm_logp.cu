// awm_logp and its gradient on the GPU.
#include "cuda/awm_logp.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"

namespace qirl::cuda {
namespace {

struct Power {
  __device__ __forceinline__ double operator()(double x, double y) const { return pow(x, y); }
};

template <class V, bool kGradient>
__global__ void __launch_bounds__(kRowThreads) block_kernel(AwmArgs args, unsigned per_row) {
  const Span span(args.row_size, per_row);
  float v[kPerThread], noise[kPerThread], x0[kPerThread], out[1][kPerThread];
  span.load<V>(args.v, v);
  span.load_any(args.noise, noise);
  span.load_any(args.x0, x0);
  const float slope = kGradient ? args.grad_B[span.row] * args.slope_B[span.row] : 0.0f;
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const float r = awm_residual(v[k], noise[k], x0[k]);
    out[0][k] = kGradient ? slope * r : r * r;
  }
  if constexpr (kGradient) {
    span.store<V>(args.dv, args.row_size, out[0]);
  } else {
    sum_block(out, args.sums + blockIdx.x);
  }
}

__global__ void __launch_bounds__(32) row_kernel(AwmArgs args, int64_t per_row) {
  const int64_t row = blockIdx.x;
  const double sum = ordered_sum(args.sums + row * per_row, per_row);
  if (threadIdx.x != 0) return;
  const AwmRow result = awm_row(sum, args.row_size, args.time_B[row], args.form, Power{});
  args.logp_B[row] = result.logp;
  args.slope_out_B[row] = result.slope;
}

template <bool kGradient>
int over_blocks(const AwmArgs& args, int64_t per_row, void* stream) {
  return with_storage_types({args.v.dtype}, [&](auto v) {
    using V = typename decltype(v)::type;
    return launch(block_kernel<V, kGradient>, args.rows * per_row, kRowThreads, stream, args,
                  (unsigned)per_row);
  });
}

}  // namespace

int awm_logp(const AwmArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args.row_size);
  const int error = over_blocks<false>(args, per_row, stream);
  return error != 0 ? error : launch(row_kernel, args.rows, 32, stream, args, per_row);
}

int awm_logp_backward(const AwmArgs& args, void* stream) {
  return over_blocks<true>(args, blocks_per_row(args.row_size), stream);
}

}  // namespace qirl::cuda
