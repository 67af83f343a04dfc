// flow_step, flow_logp and its gradient on the GPU, from the formulas of csrc/math/.
//
// A CTA of 128 threads takes one block of 1024 elements of one row; a thread takes 8 neighbouring
// elements, that is two Philox counters and accesses of 128 bits where the row is aligned. Squares
// are added in the order of the CPU kernels (16 virtual lanes, a fixed tree, blocks in float64) and
// nothing is contracted (-fmad=false): the definition leaves no freedom, so both backends give the
// same bits.
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

// args.sums[task] from the squares of one block, which shared memory holds.
__device__ __forceinline__ void add_squares(const FlowArgs& args, int64_t task,
                                            const float* squares) {
  __syncthreads();
  if (threadIdx.x >= 32) return;
  const int lane = threadIdx.x % kSumLanes;  // the second half of the warp does the same
  float sum = 0.0f;
  for (int i = lane; i < kBlock; i += kSumLanes) sum += squares[i];
  sum = warp_sum<kSumLanes>(sum);
  if (threadIdx.x == 0) args.sums[task] = sum;
}

template <class X, class V, bool kReplay>
__global__ void __launch_bounds__(kThreads) score_kernel(FlowArgs args, unsigned per_row) {
  __shared__ __align__(16) float squares[kBlock];
  const int64_t row = blockIdx.x / per_row;
  const int64_t start = (int64_t)(blockIdx.x % per_row) * kBlock + threadIdx.x * kPerThread;
  const int64_t left = args.row_size - start;
  float mean[kPerThread], x_next[kPerThread], square[kPerThread];
  means_at<X, V>(args, row, start, left, mean);
  if constexpr (kReplay) {
    load_vec_n((const X*)args.x_next_in + row * args.x_next_stride + start, left, x_next);
  } else {
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
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) {
    const float r = k < left ? flow_residual(x_next[k], mean[k]) : 0.0f;
    square[k] = r * r;
  }
  store_vec(squares + threadIdx.x * kPerThread, square);
  add_squares(args, blockIdx.x, squares);
}

__global__ void finish_kernel(FlowArgs args, unsigned per_row) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  double sum = 0.0;
  for (unsigned block = 0; block < per_row; ++block) sum += args.sums[row * per_row + block];
  args.logp_B[row] = flow_log_prob(sum, args.row_size, args.w_B[row], args.b_B[row]);
}

template <class X, class V>
__global__ void __launch_bounds__(kThreads) backward_kernel(FlowArgs args, unsigned per_row) {
  const int64_t row = blockIdx.x / per_row;
  const int64_t start = (int64_t)(blockIdx.x % per_row) * kBlock + threadIdx.x * kPerThread;
  const int64_t left = args.row_size - start;
  const float grad = args.grad_B[row], w = args.w_B[row];
  const float slope_v = flow_log_prob_slope(grad, w, args.c_B[row], args.row_size);
  const float slope_x = flow_log_prob_slope(grad, w, args.a_B[row], args.row_size);
  float mean[kPerThread], r[kPerThread], out[kPerThread];
  means_at<X, V>(args, row, start, left, mean);
  load_vec_n((const X*)args.x_next_in + row * args.x_next_stride + start, left, r);
#pragma unroll
  for (int k = 0; k < kPerThread; ++k) r[k] = flow_residual(r[k], mean[k]);
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

// Blocks a row; the grid is rows times as many, which launch() checks, so that 32 bits hold it.
int64_t blocks_per_row(const FlowArgs& args) { return (args.row_size + kBlock - 1) / kBlock; }

template <bool kReplay>
int score(const FlowArgs& args, void* stream) {
  const int64_t per_row = blocks_per_row(args);
  const int error = with_storage_types({args.x_dtype, args.v_dtype}, [&](auto x, auto v) {
    using X = typename decltype(x)::type;
    using V = typename decltype(v)::type;
    return launch(score_kernel<X, V, kReplay>, args.rows * per_row, kThreads, stream, args,
                  (unsigned)per_row);
  });
  if (error != 0) return error;
  const int64_t grid = (args.rows + kThreads - 1) / kThreads;
  return launch(finish_kernel, grid, kThreads, stream, args, (unsigned)per_row);
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
