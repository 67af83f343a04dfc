// velocity_loss on the GPU: block sums and the gradient in one pass, then the rows, then the mean.
#include "cuda/velocity_loss.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/rows.h"
#include "math/velocity_loss.h"

namespace qirl::cuda {
namespace {

template <class V, class T>
__global__ void __launch_bounds__(kRowThreads) block_kernel(VelocityArgs args, unsigned per_row) {
  const Span span(args.row_size, per_row);
  float v[kPerThread], r[kPerThread], square[1][kPerThread];
  span.load<V>(args.v, v);
  span.load<T>(args.target, r);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    r[k] = velocity_error(v[k], r[k]);
    square[0][k] = r[k] * r[k];
  }
  if (args.dv) {
    const float weight = args.weight_B ? args.weight_B[span.row] : 1.0f;
    const float slope = velocity_slope(weight, args.row_size, args.rows);
#pragma unroll
    for (int k = 0; k < kPerThread; ++k) r[k] = slope * r[k];
    span.store<V>(args.dv, args.row_size, r);
  }
  sum_block(square, args.sums + blockIdx.x);
}

__global__ void __launch_bounds__(32) row_kernel(VelocityArgs args, int64_t per_row) {
  const int64_t row = blockIdx.x;
  const double mse = ordered_sum(args.sums + row * per_row, per_row) / (double)args.row_size;
  if (threadIdx.x != 0) return;
  args.mse_B[row] = (float)mse;
  args.terms_B[row] = (args.weight_B ? (double)args.weight_B[row] : 1.0) * mse;
}

}  // namespace

int velocity_loss(const VelocityArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args.row_size);
  int error = with_storage_types({args.v.dtype, args.target.dtype}, [&](auto v, auto target) {
    using V = typename decltype(v)::type;
    using T = typename decltype(target)::type;
    return launch(block_kernel<V, T>, args.rows * per_row, kRowThreads, stream, args,
                  (unsigned)per_row);
  });
  if (error == 0) error = launch(row_kernel, args.rows, 32, stream, args, per_row);
  return error != 0 ? error : mean_of_rows(args.terms_B, args.rows, args.loss, stream);
}

}  // namespace qirl::cuda
