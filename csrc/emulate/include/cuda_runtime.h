// Shadows CUDA's header when g++ or clang++ compiles csrc/cuda/*.cu unchanged for the emulator.
// Holds what those files use; add a function here when a kernel needs it, with CUDA's rounding.
#pragma once

#if defined(__CUDACC__)
#error "csrc/emulate/include is for the host compiler; nvcc has its own cuda_runtime.h"
#endif

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "emulate/run.h"

#define QIRL_EMULATED 1

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// One OS thread runs everything, and the kernels' library has no other thread_local: its TLS block
// is the shared memory, which run.cpp poisons before each block.
#define __shared__ static thread_local

struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) int2 {
  int x, y;
};
struct __align__(16) int4 {
  int x, y, z, w;
};
struct __align__(16) double2 {
  double x, y;
};

static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- host side ---------------------------------------------------------------------------------

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719,
};
static inline cudaError_t cudaGetLastError() { return cudaSuccess; }
static inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure          ? qirl::emulate::failure()
         : error == cudaErrorInvalidConfiguration ? "invalid configuration argument"
                                                  : "error of the CUDA emulator";
}

// ---- barriers and warps ------------------------------------------------------------------------

#define QIRL_SITE \
  ::qirl::emulate::Site { __FILE__, __LINE__ }
#define __syncthreads() ((void)::qirl::emulate::barrier(QIRL_SITE))
#define __syncthreads_count(predicate) ::qirl::emulate::barrier(QIRL_SITE, (predicate) != 0)
#define __syncthreads_or(predicate) (::qirl::emulate::barrier(QIRL_SITE, (predicate) != 0) > 0)
#define __syncthreads_and(predicate) (::qirl::emulate::barrier(QIRL_SITE, (predicate) == 0) == 0)
#define __shfl_sync(...) ::qirl::emulate::shuffle_from(QIRL_SITE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::qirl::emulate::shuffle_xor(QIRL_SITE, __VA_ARGS__)
#define __shfl_down_sync(...) ::qirl::emulate::shuffle_down(QIRL_SITE, __VA_ARGS__)
#define __shfl_up_sync(...) ::qirl::emulate::shuffle_up(QIRL_SITE, __VA_ARGS__)
#define __ballot_sync(mask, predicate)                                                      \
  ((unsigned)::qirl::emulate::exchange(QIRL_SITE, ::qirl::emulate::Exchange::kBallot, mask, \
                                       (predicate) != 0, 0))
#define __any_sync(mask, predicate) (__ballot_sync(mask, predicate) != 0u)
#define __all_sync(mask, predicate) (__ballot_sync(mask, !(predicate)) == 0u)
#define __syncwarp() ((void)__ballot_sync(0xffffffffu, 1))
static inline void __threadfence() {}

// ---- arithmetic: everything rounds as its CUDA namesake ----------------------------------------

template <class To, class From>
static inline To qirl_bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

static inline unsigned __float_as_uint(float v) { return qirl_bits_as<unsigned>(v); }
static inline int __float_as_int(float v) { return qirl_bits_as<int>(v); }
static inline float __uint_as_float(unsigned v) { return qirl_bits_as<float>(v); }
static inline float __int_as_float(int v) { return qirl_bits_as<float>(v); }
static inline long long __double_as_longlong(double v) { return qirl_bits_as<long long>(v); }
static inline double __longlong_as_double(long long v) { return qirl_bits_as<double>(v); }
static inline float __int2float_rn(int v) { return (float)v; }
static inline float __uint2float_rn(unsigned v) { return (float)v; }
static inline int __float2int_rn(float v) { return (int)rintf(v); }
static inline unsigned __umulhi(unsigned a, unsigned b) {
  return (unsigned)(((uint64_t)a * b) >> 32);
}
static inline float __fadd_rn(float a, float b) { return a + b; }
static inline float __fsub_rn(float a, float b) { return a - b; }
static inline float __fmul_rn(float a, float b) { return a * b; }
static inline float __fdiv_rn(float a, float b) { return a / b; }
static inline float __frcp_rn(float a) { return 1.0f / a; }
static inline float __fsqrt_rn(float a) { return sqrtf(a); }
static inline double __dadd_rn(double a, double b) { return a + b; }
static inline double __dmul_rn(double a, double b) { return a * b; }
static inline double __ddiv_rn(double a, double b) { return a / b; }
static inline double __dsqrt_rn(double a) { return sqrt(a); }
static inline int __popc(unsigned v) { return __builtin_popcount(v); }
static inline int __clz(int v) { return v == 0 ? 32 : __builtin_clz((unsigned)v); }
static inline int __ffs(int v) { return __builtin_ffs(v); }

template <class T>
static inline T __ldg(const T* p) {
  return *p;
}
template <class T>
static inline T __ldcs(const T* p) {
  return *p;
}
template <class T>
static inline void __stcs(T* p, T value) {
  *p = value;
}
template <class T>
static inline T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
static inline T max(T a, T b) {
  return a < b ? b : a;
}
// Of integers only: float atomics would make sums depend on timing.
template <class T, class = std::enable_if_t<std::is_integral_v<T>>>
static inline T atomicAdd(T* p, T value) {
  const T before = *p;
  *p += value;
  return before;
}
