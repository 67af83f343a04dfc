// Registers to 8-bit floats: what the kernels that write them share. Formulas: math/fp8.h.
#pragma once

#include "cuda/reduce.cuh"
#include "cuda/vec.cuh"
#include "math/fp8.h"
#include "math/fp8_out.h"

namespace qirl::cuda {

constexpr int kFp8Span = 128;  // elements of a row that share a scale, if not all of them do

QIRL_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }

QIRL_DEVICE uint32_t finite_magnitude(float x) {
  const uint32_t bits = ScalarOps::bits(x) & 0x7fffffffu;
  return bits < 0x7f800000u ? bits : 0u;
}

template <int N>
QIRL_DEVICE uint32_t largest_of(const float (&x)[N]) {
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < N; ++i) most = larger(most, finite_magnitude(x[i]));
  return most;
}

template <class Format>
QIRL_DEVICE float scale_of(uint32_t amax_bits) {
  return fp8_scale<Format>(ScalarOps::from_bits(amax_bits));
}

// The first n of N codes, packed four to a word, in one access where all are there and aligned.
template <int N>
QIRL_DEVICE void store_codes(uint8_t* p, int64_t n, const uint32_t (&words)[N / 4]) {
  if (n >= N && ((uintptr_t)p & (N - 1)) == 0) {
    typename Word<N>::type all;
    memcpy(&all, words, N);
    *(decltype(all)*)p = all;
    return;
  }
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (i < n) p[i] = (uint8_t)(words[i / 4] >> (8 * (i % 4)));
  }
}

template <class Format, int N>
QIRL_DEVICE void convert(uint8_t* q, int64_t n, const float (&x)[N], float inverse) {
  uint32_t words[N / 4] = {};
#pragma unroll
  for (int i = 0; i < N; ++i) {
    words[i / 4] |= fp8_bits<ScalarOps, Format>(x[i], inverse) << (8 * (i % 4));
  }
  store_codes<N>(q, n, words);
}

// `value` as it reads back after being stored as T, zeros behind the first n: what takes part in a
// scale.
template <class T, int N>
QIRL_DEVICE void round_row(int64_t n, float (&value)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) value[i] = i < n ? round_as<T>(value[i]) : 0.0f;
}

}  // namespace qirl::cuda
