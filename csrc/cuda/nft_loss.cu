// nft_loss on the GPU: five sums of each block, the rows, the gradient from what the rows give (it
// reads the inputs again), and the mean.
#include "cuda/nft_loss.h"

#include "cuda/launch.cuh"
#include "cuda/rows.cuh"
#include "cuda/rows.h"

namespace qirl::cuda {
namespace {

template <class V, bool kGradient>
__global__ void __launch_bounds__(kRowThreads) block_kernel(NftArgs args, unsigned per_row) {
  const Span span(args.row_size, per_row);
  float v[kPerThread], old[kPerThread], x_t[kPerThread], x0[kPerThread], ref[kPerThread];
  span.load<V>(args.v, v);
  span.load_any(args.v_old, old);
  span.load_any(args.x_t, x_t);
  span.load_any(args.x0, x0);
  if (args.v_ref.data) span.load_any(args.v_ref, ref);
  const float sigma = args.sigma_B[span.row];
  const float sigma_beta = (float)((double)sigma * args.options.beta);
  const float* slopes = args.slopes_B + span.row;
  float out[kGradient ? 1 : kNftSums][kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const NftErrors<float> e = nft_errors(v[k], old[k], x_t[k], x0[k], sigma, sigma_beta);
    const float away = args.v_ref.data ? v[k] - ref[k] : 0.0f;
    if constexpr (kGradient) {
      out[0][k] = nft_gradient(e, away, slopes[0], slopes[args.rows], slopes[2 * args.rows]);
    } else {
      out[0][k] = fabsf(e.better);
      out[1][k] = fabsf(e.worse);
      out[2][k] = e.better * e.better;
      out[3][k] = e.worse * e.worse;
      out[4][k] = away * away;
    }
  }
  if constexpr (kGradient) {
    span.store<V>(args.dv, args.row_size, out[0]);
  } else {
    sum_block(out, args.sums + (int64_t)blockIdx.x * kNftSums);
  }
}

__global__ void __launch_bounds__(32) row_kernel(NftArgs args, int64_t per_row) {
  const int64_t row = blockIdx.x;
  double sums[kNftSums];
  for (int k = 0; k < kNftSums; ++k) {
    sums[k] = ordered_sum(args.sums + row * per_row * kNftSums + k, per_row, kNftSums);
  }
  if (threadIdx.x != 0) return;
  const NftRow result = nft_row(sums, args.row_size, args.rows, args.sigma_B[row],
                                args.advantage_B[row], args.options);
  args.terms_B[row] = nft_term(result, args.options);
  args.metrics[row] = (float)result.policy;
  args.metrics[args.rows + row] = (float)result.better_mse;
  args.metrics[2 * args.rows + row] = (float)result.worse_mse;
  args.metrics[3 * args.rows + row] = (float)result.ref_mse;
  args.slopes_B[row] = result.better_slope;
  args.slopes_B[args.rows + row] = result.worse_slope;
  args.slopes_B[2 * args.rows + row] = result.ref_slope;
}

template <bool kGradient>
int over_blocks(const NftArgs& args, int64_t per_row, void* stream) {
  return with_storage_types({args.v.dtype}, [&](auto v) {
    using V = typename decltype(v)::type;
    return launch(block_kernel<V, kGradient>, args.rows * per_row, kRowThreads, stream, args,
                  (unsigned)per_row);
  });
}

}  // namespace

int nft_loss(const NftArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args.row_size);
  int error = over_blocks<false>(args, per_row, stream);
  if (error == 0) error = launch(row_kernel, args.rows, 32, stream, args, per_row);
  if (error == 0 && args.dv) error = over_blocks<true>(args, per_row, stream);
  return error != 0 ? error : mean_of_rows(args.terms_B, args.rows, args.loss, stream);
}

}  // namespace qirl::cuda
