// What flow_step and guide_step share: a CTA of 128 threads takes one block of 1024 elements of one
// row; a thread takes 8 neighbouring elements, that is two Philox counters and accesses of 128 bits
// where the row is aligned. Squares are added in the order of the CPU kernels (16 virtual lanes, a
// fixed tree, blocks in float64) and nothing is contracted (-fmad=false): the definition leaves no
// freedom, so both backends give the same bits.
#pragma once

#include "cuda/flow_step.h"
#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/flow_step.h"
#include "math/philox.h"

namespace qirl::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 128, kPerThread = kBlock / kThreads, kSumLanes = 16;

struct ScalarOps {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  static __device__ __forceinline__ void multiply_wide(U a, uint32_t m, U& high, U& low) {
    high = __umulhi(a, m);
    low = a * m;
  }
  static __device__ __forceinline__ F to_float(I value) { return __int2float_rn(value); }
  static __device__ __forceinline__ F square_root(F value) { return __fsqrt_rn(value); }
  static __device__ __forceinline__ U bits(F value) { return __float_as_uint(value); }
  static __device__ __forceinline__ F from_bits(U value) { return __uint_as_float(value); }
};

// x_next of the thread's elements: drawn, rounded to storage, stored.
template <class X>
__device__ __forceinline__ void draw(const FlowArgs& args, int64_t row, int64_t start, int64_t left,
                                     const float (&mean)[kPerThread], float (&x_next)[kPerThread]) {
  const uint32_t group[2] = {(uint32_t)(start / 4), (uint32_t)(start / 4) + 1};
  float noise[2][4];
  normals4<ScalarOps, 2>(group, args.seed_B[row], args.offset, noise);
  const float s = args.s_B[row];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    x_next[k] = round_as<X>(flow_sample(mean[k], noise[k / 4][k % 4], s));
  }
  store_vec_n((X*)args.x_next_out + row * args.row_size + start, left, x_next);
}

// args.sums[task] of one block from its residuals r, which count as 0 behind the row's end.
__device__ __forceinline__ void add_squares(const FlowArgs& args, int64_t task, int64_t left,
                                            const float (&r)[kPerThread]) {
  __shared__ __align__(16) float squares[kBlock];
  float square[kPerThread];
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) square[k] = k < left ? r[k] * r[k] : 0.0f;
  store_vec(squares + threadIdx.x * kPerThread, square);
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x % kSumLanes;  // the second half of the warp does the same
  float sum = 0.0f;
  for (int i = lane; i < kBlock; i += kSumLanes) sum += squares[i];
  sum = warp_sum<kSumLanes>(sum);
  if (threadIdx.x == 0) args.sums[task] = sum;
}

__global__ void finish_kernel(FlowArgs args, unsigned per_row) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  double sum = 0.0;
  for (unsigned block = 0; block < per_row; ++block) sum += args.sums[row * per_row + block];
  args.logp_B[row] = flow_log_prob(sum, args.row_size, args.w_B[row], args.b_B[row]);
}

// Blocks a row; the grid is rows times as many, which launch() checks, so that 32 bits hold it.
int64_t blocks_per_row(const FlowArgs& args) { return (args.row_size + kBlock - 1) / kBlock; }

// logp_B from the sums of all blocks.
int finish_log_prob(const FlowArgs& args, void* stream) {
  const int64_t grid = (args.rows + kThreads - 1) / kThreads;
  return launch(finish_kernel, grid, kThreads, stream, args, (unsigned)blocks_per_row(args));
}

}  // namespace
}  // namespace qirl::cuda
