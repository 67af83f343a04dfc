// flow_step, flow_logp and its gradient on the GPU, from the formulas of csrc/math/.
//
// A CTA of 256 threads takes one block of 1024 elements of one row; a thread takes one Philox
// counter, that is 4 elements. Squares are added in the order of the CPU kernels (16 virtual lanes,
// a fixed tree, blocks in float64) and nothing is contracted (-fmad=false): the definition leaves
// no freedom, so both backends give the same bits.
#include "cuda/flow_step.h"

#include <cuda_runtime.h>

#include "math/flow_step.h"
#include "math/philox.h"

namespace qirl::cuda {
namespace {

constexpr int kBlock = 1024, kThreads = 256, kPerThread = 4, kSumLanes = 16;

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

struct bf16 {
  uint16_t bits;
};

__device__ __forceinline__ float load(const float* p) { return *p; }
__device__ __forceinline__ float load(const bf16* p) {
  return __uint_as_float((uint32_t)p->bits << 16);
}

// As vec.h: to nearest, ties to even, NaN stays NaN.
__device__ __forceinline__ float store(float* p, float value) { return *p = value; }
__device__ __forceinline__ float store(bf16* p, float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
  p->bits = (uint16_t)(rounded >> 16);
  return load(p);
}

template <class X, class V>
__device__ __forceinline__ float mean_at(const FlowArgs& args, int64_t row, int64_t i) {
  float delta = 0.0f;
  if (args.delta) {
    const int64_t at = row * args.delta_stride + i;
    delta = args.delta_dtype == 0 ? load((const float*)args.delta + at)
                                  : load((const bf16*)args.delta + at);
  }
  const float x = load((const X*)args.x + row * args.x_stride + i);
  const float v = load((const V*)args.v + row * args.v_stride + i);
  return flow_mean(x, v, delta, args.a_B[row], args.c_B[row]);
}

// args.sums[task] from the squares of one block, which shared memory holds.
__device__ __forceinline__ void add_squares(const FlowArgs& args, int64_t task, float* squares) {
  __syncthreads();
  const int lane = threadIdx.x;
  if (lane < kSumLanes) {
    float sum = 0.0f;
    for (int i = lane; i < kBlock; i += kSumLanes) sum += squares[i];
    for (int width = kSumLanes / 2; width > 0; width /= 2) {
      sum += __shfl_down_sync(0xffffu, sum, width, kSumLanes);
    }
    if (lane == 0) args.sums[task] = sum;
  }
}

template <class X, class V, bool kReplay>
__global__ void __launch_bounds__(kThreads) score_kernel(FlowArgs args, int64_t per_row) {
  __shared__ float squares[kBlock];
  const int64_t row = blockIdx.x / per_row, first = (blockIdx.x % per_row) * kBlock;
  const int64_t start = first + threadIdx.x * kPerThread;
  float noise[1][kPerThread] = {};
  if (!kReplay) {
    const uint32_t group[1] = {(uint32_t)(start / kPerThread)};
    normals4<ScalarOps, 1>(group, args.seed_B[row], args.offset, noise);
  }
  for (int k = 0; k < kPerThread; ++k) {
    const int64_t i = start + k;
    float r = 0.0f;
    if (i < args.row_size) {
      const float mean = mean_at<X, V>(args, row, i);
      const float x_next = kReplay ? load((const X*)args.x_next_in + row * args.x_next_stride + i)
                                   : store((X*)args.x_next_out + row * args.row_size + i,
                                           flow_sample(mean, noise[0][k], args.s_B[row]));
      r = flow_residual(x_next, mean);
    }
    squares[threadIdx.x * kPerThread + k] = r * r;
  }
  add_squares(args, blockIdx.x, squares);
}

__global__ void finish_kernel(FlowArgs args, int64_t per_row) {
  const int64_t row = (int64_t)blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= args.rows) return;
  double sum = 0.0;
  for (int64_t block = 0; block < per_row; ++block) sum += args.sums[row * per_row + block];
  args.logp_B[row] = flow_log_prob(sum, args.row_size, args.w_B[row], args.b_B[row]);
}

template <class X, class V>
__global__ void __launch_bounds__(kThreads) backward_kernel(FlowArgs args, int64_t per_row) {
  const int64_t row = blockIdx.x / per_row, first = (blockIdx.x % per_row) * kBlock;
  const float grad = args.grad_B[row], w = args.w_B[row];
  const float slope_v = flow_log_prob_slope(grad, w, args.c_B[row], args.row_size);
  const float slope_x = flow_log_prob_slope(grad, w, args.a_B[row], args.row_size);
  for (int64_t i = first + threadIdx.x; i < first + kBlock && i < args.row_size; i += kThreads) {
    const float x_next = load((const X*)args.x_next_in + row * args.x_next_stride + i);
    const float r = flow_residual(x_next, mean_at<X, V>(args, row, i));
    if (args.dv) store((V*)args.dv + row * args.row_size + i, slope_v * r);
    if (args.dx) store((X*)args.dx + row * args.row_size + i, slope_x * r);
  }
}

// launch(x, v) with null pointers of the storage types.
template <class Launch>
void with_storage_types(const FlowArgs& args, Launch launch) {
  auto with_v = [&](auto* x) {
    args.v_dtype == 0 ? launch(x, (float*)nullptr) : launch(x, (bf16*)nullptr);
  };
  args.x_dtype == 0 ? with_v((float*)nullptr) : with_v((bf16*)nullptr);
}

template <class T>
T value_of(T*);

template <bool kReplay>
int score(const FlowArgs& args, cudaStream_t stream) {
  const int64_t per_row = (args.row_size + kBlock - 1) / kBlock, blocks = args.rows * per_row;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  with_storage_types(args, [&](auto* x, auto* v) {
    using X = decltype(value_of(x));
    using V = decltype(value_of(v));
    score_kernel<X, V, kReplay><<<(unsigned)blocks, kThreads, 0, stream>>>(args, per_row);
  });
  const unsigned grid = (unsigned)((args.rows + kThreads - 1) / kThreads);
  finish_kernel<<<grid, kThreads, 0, stream>>>(args, per_row);
  return cudaGetLastError();
}

}  // namespace

int flow_step(const FlowArgs& args, void* stream) {
  return score<false>(args, (cudaStream_t)stream);
}

int flow_logp(const FlowArgs& args, void* stream) {
  return score<true>(args, (cudaStream_t)stream);
}

int flow_logp_backward(const FlowArgs& args, void* stream) {
  const int64_t per_row = (args.row_size + kBlock - 1) / kBlock, blocks = args.rows * per_row;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  with_storage_types(args, [&](auto* x, auto* v) {
    using X = decltype(value_of(x));
    using V = decltype(value_of(v));
    backward_kernel<X, V><<<(unsigned)blocks, kThreads, 0, (cudaStream_t)stream>>>(args, per_row);
  });
  return cudaGetLastError();
}

const char* error_text(int error) { return cudaGetErrorString((cudaError_t)error); }

}  // namespace qirl::cuda
