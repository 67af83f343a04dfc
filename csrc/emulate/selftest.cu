#include "emulate/selftest.h"

#include "cuda/launch.cuh"
#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"

namespace qirl::emulate {
namespace {

using namespace qirl::cuda;

// ---- wrong on purpose --------------------------------------------------------------------------

__global__ void left_behind(float* out) {
  if (threadIdx.x == 3) return;
  __syncthreads();
  out[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1.0f;
}

__global__ void half_a_warp(float* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
}

__global__ void outside_the_mask(float* out) {
  out[threadIdx.x] = __shfl_xor_sync(0xffffu, 1.0f, 1);
}

__global__ void barrier_against_shuffle(float* out) {
  if (threadIdx.x < 16) {
    __syncthreads();
  } else {
    out[threadIdx.x] = __shfl_down_sync(0xffffffffu, 1.0f, 1);
  }
}

__global__ void misaligned(float* out) {
  float value[4];
  load_vec(out + 1, value);
  out[threadIdx.x] = value[0];
}

__global__ void unwritten_shared(float* out) {
  __shared__ float values[64];
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = 1.0f;
  __syncthreads();
  out[blockIdx.x * 64 + threadIdx.x] = values[threadIdx.x];
}

__global__ void missing_barrier(float* out) {
  __shared__ float values[64];
  values[threadIdx.x] = (float)threadIdx.x;
  out[threadIdx.x] = values[63 - threadIdx.x];
}

__global__ void block_order(float* out, float* last) {
  if (threadIdx.x == 0) *last = (float)blockIdx.x;
  out[blockIdx.x] = *last;
}

// ---- right -------------------------------------------------------------------------------------

__global__ void sums(float* out) {
  float value[2] = {(float)threadIdx.x, 1.0f};
  block_sum<96>(value);
  double twice = block_sum<96>((double)threadIdx.x);
  const float greatest = block_max<96>((float)(threadIdx.x * 7 % 96));
  const float eighth = warp_sum<8>((float)threadIdx.x);
  const float from = __shfl_sync(0xffffffffu, (float)threadIdx.x, 5, 16);
  const float nan = warp_max(threadIdx.x % 32 == 9 ? NAN : 1.0f);
  const bool any = __syncthreads_or(threadIdx.x == 95);
  if (threadIdx.x != 90) return;
  out[0] = value[0];
  out[1] = value[1];
  out[2] = (float)twice;
  out[3] = greatest;
  out[4] = eighth;
  out[5] = from;
  out[6] = nan;
  out[7] = any;
}

// out[0..N) is stored as T at address shift, n elements of it, and read back; out[64 + shift]
// counts what differs. Shift 0 is aligned, the others are not.
template <class T, int N>
__global__ void round_trip(float* out) {
  __shared__ __align__(16) T all[16][64];
  const int shift = threadIdx.x;
  T* stored = all[threadIdx.x];
  out[64 + shift] = 0.0f;
  for (int n = 0; n <= N; ++n) {
    float value[N], back[N];
    load_vec_n(out, n, value);
    for (int i = 0; i < N; ++i) stored[shift + i] = narrow<T>(-1.0f);
    store_vec_n(stored + shift, n, value);
    load_vec_n(stored + shift, N, back);
    for (int i = 0; i < N; ++i) {
      const float want = i < n ? round_as<T>(out[i]) : -1.0f;
      out[64 + shift] += __float_as_uint(back[i]) != __float_as_uint(want);
    }
  }
}

}  // namespace

int selftest(const char* name, float* out) {
  const auto is = [&](const char* other) { return strcmp(name, other) == 0; };
  void (*const simple[])(float*) = {
      left_behind, two_barriers,   half_a_warp, outside_the_mask, barrier_against_shuffle,
      misaligned,  missing_barrier};
  const char* const names[] = {
      "left_behind", "two_barriers",   "half_a_warp", "outside_the_mask", "barrier_against_shuffle",
      "misaligned",  "missing_barrier"};
  for (int i = 0; i < 7; ++i) {
    if (is(names[i])) return launch(simple[i], 1, 64, nullptr, out);
  }
  if (is("unwritten_shared")) return launch(unwritten_shared, 4, 64, nullptr, out);
  if (is("block_order")) return launch(block_order, 64, 1, nullptr, out, out + 1000);
  if (is("sums")) return launch(sums, 1, 96, nullptr, out);
  if (is("round_trip_float")) return launch(round_trip<float, 8>, 1, 16, nullptr, out);
  if (is("round_trip_bf16")) return launch(round_trip<bf16, 8>, 1, 16, nullptr, out);
  if (is("no_blocks")) return launch(sums, 0, 96, nullptr, out);
  if (is("too_many_blocks")) return launch(sums, (int64_t)1 << 31, 96, nullptr, out);
  return -1;
}

}  // namespace qirl::emulate
