// Storage types and accesses of up to 128 bits, converted to and from float32 registers.
//
// Rounding is that of cpu/vec.h: to nearest, ties to even, NaN stays NaN. Arithmetic belongs in
// math/, in float32.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

#define QIRL_DEVICE static __device__ __forceinline__

namespace qirl::cuda {

#if defined(QIRL_EMULATED)
using emulate::require_aligned;
#else
QIRL_DEVICE void require_aligned(const void*, int) {}  // the hardware faults
#endif

struct bf16 {
  uint16_t bits;
};

// ---- storage types, on the host ----------------------------------------------------------------

template <class T>
struct Stored {
  using type = T;
};

template <int I, int N, class Launch, class... Picked>
int pick_storage_types(const int (&dtypes)[N], Launch& launch, Picked... picked) {
  if constexpr (I == N) {
    return launch(picked...);
  } else {
    return dtypes[I] == 0 ? pick_storage_types<I + 1>(dtypes, launch, picked..., Stored<float>{})
                          : pick_storage_types<I + 1>(dtypes, launch, picked..., Stored<bf16>{});
  }
}

// with_storage_types({x_dtype, v_dtype}, [&](auto x, auto v) { ... }): `typename decltype(x)::type`
// is float for code 0 (kFloat32), bf16 for any other. Returns what the lambda returns, an int.
template <int N, class Launch>
int with_storage_types(const int (&dtypes)[N], Launch launch) {
  return pick_storage_types<0>(dtypes, launch);
}

// ---- one element -------------------------------------------------------------------------------

QIRL_DEVICE float widen(float value) { return value; }
QIRL_DEVICE float widen(bf16 value) { return __uint_as_float((uint32_t)value.bits << 16); }

template <class T>
QIRL_DEVICE T narrow(float value);

template <>
__device__ __forceinline__ float narrow<float>(float value) {
  return value;
}

template <>
__device__ __forceinline__ bf16 narrow<bf16>(float value) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = value == value ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
  return bf16{(uint16_t)(rounded >> 16)};
}

// `value` as it reads back after being stored as T.
template <class T>
QIRL_DEVICE float round_as(float value) {
  return widen(narrow<T>(value));
}

template <class T>
QIRL_DEVICE float load(const T* p) {
  return widen(*p);
}

template <class T>
QIRL_DEVICE void store(T* p, float value) {
  *p = narrow<T>(value);
}

// ---- N elements --------------------------------------------------------------------------------

template <int kBytes>
struct Word;  // what one access moves
template <>
struct Word<16> {
  using type = uint4;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<2> {
  using type = uint16_t;
};

// N elements as the registers of whole accesses: the widest that divides them.
template <class T, int N>
struct Pack {
  static constexpr int kBytes = N * (int)sizeof(T);
  static constexpr int kWordBytes = kBytes % 16 == 0  ? 16
                                    : kBytes % 8 == 0 ? 8
                                    : kBytes % 4 == 0 ? 4
                                                      : 2;
  static constexpr int kWords = kBytes / kWordBytes;
  using WordType = typename Word<kWordBytes>::type;
  union {
    WordType words[kWords];
    T elements[N];
  };
  __device__ __forceinline__ Pack() {}
};

// Alignment load_vec and store_vec want, in bytes.
template <class T, int N>
constexpr int kVecAlign = Pack<T, N>::kWordBytes;

template <class T, int N>
QIRL_DEVICE bool is_aligned(const T* p) {
  return ((uintptr_t)p & (kVecAlign<T, N> - 1)) == 0;
}

// value[i] = p[i] for i < N; p is aligned to kVecAlign<T, N>.
template <class T, int N>
QIRL_DEVICE void load_vec(const T* p, float (&value)[N]) {
  Pack<T, N> pack;
  using WordType = typename Pack<T, N>::WordType;
  require_aligned(p, kVecAlign<T, N>);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) pack.words[i] = ((const WordType*)p)[i];
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = widen(pack.elements[i]);
}

// p[i] = value[i], rounded; p is aligned to kVecAlign<T, N>.
template <class T, int N>
QIRL_DEVICE void store_vec(T* p, const float (&value)[N]) {
  Pack<T, N> pack;
  using WordType = typename Pack<T, N>::WordType;
  require_aligned(p, kVecAlign<T, N>);
#pragma unroll
  for (int i = 0; i < N; ++i) pack.elements[i] = narrow<T>(value[i]);
#pragma unroll
  for (int i = 0; i < Pack<T, N>::kWords; ++i) ((WordType*)p)[i] = pack.words[i];
}

// As load_vec for any alignment and for the end of a row: the first n elements (n <= N, may be
// negative), zeros behind them.
template <class T, int N>
QIRL_DEVICE void load_vec_n(const T* p, int64_t n, float (&value)[N]) {
  if (n >= N && is_aligned<T, N>(p)) return load_vec(p, value);
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = i < n ? widen(p[i]) : 0.0f;
}

// As store_vec for any alignment and for the end of a row: writes the first n elements.
template <class T, int N>
QIRL_DEVICE void store_vec_n(T* p, int64_t n, const float (&value)[N]) {
  if (n >= N && is_aligned<T, N>(p)) return store_vec(p, value);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) store(p + i, value[i]);
  }
}

}  // namespace qirl::cuda
