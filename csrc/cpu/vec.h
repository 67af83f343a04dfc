// One vector of kLanes 32-bit values for the instruction set this file is compiled for.
//
// Arithmetic uses the vector types of GCC and Clang (+ - * / & | ^ << >> and comparisons work lane
// by lane); intrinsics appear only where those are missing or slow. Everything lives in the
// namespace of the instruction set and is always inlined. No std:: templates in here.
//
// Reductions use 16 virtual lanes whatever the width, see Sum16: the same bits on all of them.
#pragma once

#include <stdint.h>
#include <string.h>

#include "math/portable.h"

#if QIRL_ISA_LEVEL >= 1
#include <immintrin.h>
#elif defined(__SSE4_1__)
#include <smmintrin.h>
#else
#include <math.h>
#endif

#define QIRL_STRINGIFY_(name) #name
#define QIRL_STRINGIFY(name) QIRL_STRINGIFY_(name)

namespace qirl {
namespace QIRL_ISA {

constexpr const char* kIsaName = QIRL_STRINGIFY(QIRL_ISA);
constexpr int kLanes = QIRL_ISA_LEVEL == 2 ? 16 : QIRL_ISA_LEVEL == 1 ? 8 : 4;

typedef float F __attribute__((vector_size(4 * kLanes)));
typedef int32_t I __attribute__((vector_size(4 * kLanes)));
typedef uint32_t U __attribute__((vector_size(4 * kLanes)));

struct bf16 {
  uint16_t bits;
};

QIRL_HD F splat(float value) { return value - F{}; }  // value - 0 keeps the sign of zero
QIRL_HD U splat_u(uint32_t value) { return value | U{}; }
QIRL_HD F select(I mask, F yes, F no) { return mask ? yes : no; }

QIRL_HD U lane_index() {
  U index;
  for (int i = 0; i < kLanes; ++i) index[i] = (uint32_t)i;
  return index;
}

// ---- widening loads, rounding stores -----------------------------------------------------------

QIRL_HD F load(const float* p) {
  F value;
  memcpy(&value, p, sizeof value);
  return value;
}

#if QIRL_ISA_LEVEL == 2
// Places of 16-bit words for permutexvar: lane i's low and high one.
QIRL_HD __m512i words(U low, U high) { return (__m512i)(high << 16 | low); }
#endif

QIRL_HD F load(const bf16* p) {
#if QIRL_ISA_LEVEL == 2
  const __m512i given = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (F)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, words(lane_index(), lane_index()), given);
#else
#if QIRL_ISA_LEVEL == 1
  const U wide = (U)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#elif defined(__SSE4_1__)
  const U wide = (U)_mm_cvtepu16_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  U wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i].bits;
#endif
  return (F)(wide << 16);
#endif
}

// Bits of `value` rounded to bfloat16 (to nearest, ties to even; NaN stays NaN), in the high half.
QIRL_HD U bf16_bits(F value) {
  const U bits = (U)value;
  const U rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return (U)select(value == value, (F)rounded, (F)splat_u(0x7fc00000u));
}

// `value` as it reads back after being stored as the type of the tag.
QIRL_HD F round_as(const float*, F value) { return value; }
QIRL_HD F round_as(const bf16*, F value) { return (F)bf16_bits(value); }

// As round_as(), for a NaN whose low half is zero: one that comes from a bfloat16 or is the
// processor's own. Plain rounding cannot carry it out of the NaNs.
QIRL_HD F round_own(const float*, F value) { return value; }
QIRL_HD F round_own(const bf16*, F value) {
  const U bits = (U)value;
  return (F)(bits + 0x7fffu + ((bits >> 16) & 1u));
}

// Stores a value that round_as() has already made representable. `stream` bypasses the caches and
// needs p aligned to the bytes stored.
QIRL_HD void store(float* p, F value, bool stream) {
#if QIRL_ISA_LEVEL == 2
  if (stream) return _mm512_stream_ps(p, (__m512)value);
#elif QIRL_ISA_LEVEL == 1
  if (stream) return _mm256_stream_ps(p, (__m256)value);
#elif defined(__SSE4_1__)
  if (stream) return _mm_stream_ps(p, (__m128)value);
#else
  (void)stream;
#endif
  memcpy(p, &value, sizeof value);
}

QIRL_HD void store(bf16* p, F value, bool stream) {
#if QIRL_ISA_LEVEL == 2
  const U from = lane_index() * 4 + 1;  // the upper words, those of lane 8 and behind again
  const __m512i upper = _mm512_permutexvar_epi16(words(from, from + 2), (__m512i)value);
  const __m256i narrow = _mm512_castsi512_si256(upper);
  if (stream) return _mm256_stream_si256((__m256i*)p, narrow);
  _mm256_storeu_si256((__m256i*)p, narrow);
#elif QIRL_ISA_LEVEL == 1
  const __m256i bits = (__m256i)((U)value >> 16), pairs = _mm256_packus_epi32(bits, bits);
  const __m128i narrow = _mm256_castsi256_si128(_mm256_permute4x64_epi64(pairs, 0x08));
  if (stream) return _mm_stream_si128((__m128i*)p, narrow);
  _mm_storeu_si128((__m128i*)p, narrow);
#else
  (void)stream;
  for (int i = 0; i < kLanes; ++i) p[i].bits = (uint16_t)(((U)value)[i] >> 16);
#endif
}

// Two vectors one behind the other, rounded as round_own() does it.
QIRL_HD void store_two(float* p, F first, F second, bool stream) {
  store(p, first, stream);
  store(p + kLanes, second, stream);
}

QIRL_HD void store_two(bf16* p, F first, F second, bool stream) {
#if QIRL_ISA_LEVEL == 2
  const U at = lane_index() * 4;  // above 31: words of the second
  const __m512i a = (__m512i)first, b = (__m512i)second;
  const __m512i low = _mm512_permutex2var_epi16(a, words(at, at + 2), b);
  const __m512i high = _mm512_permutex2var_epi16(a, words(at + 1, at + 3), b);
  const __m512i one = _mm512_set1_epi16(1), odd = _mm512_and_si512(high, one);
  const __mmask32 up =
      _mm512_cmpgt_epu16_mask(low, _mm512_sub_epi16(_mm512_set1_epi16(-0x8000), odd));
  const __m512i rounded = _mm512_mask_add_epi16(high, up, high, one);
  if (stream) return _mm512_stream_si512((__m512i*)p, rounded);
  _mm512_storeu_si512(p, rounded);
#else
  store(p, round_own(p, first), stream);
  store(p + kLanes, round_own(p, second), stream);
#endif
}

// The low byte of each lane; the lanes hold values below 256.
QIRL_HD void store_bytes(uint8_t* p, U value) {
#if QIRL_ISA_LEVEL == 2
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8((__m512i)value));
#elif QIRL_ISA_LEVEL == 1
  const __m256i words = _mm256_packus_epi32((__m256i)value, (__m256i)value);
  const __m128i eight = _mm256_castsi256_si128(_mm256_permute4x64_epi64(words, 0x08));
  _mm_storel_epi64((__m128i*)p, _mm_packus_epi16(eight, eight));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = (uint8_t)value[i];
#endif
}

// Bytes, a lane each.
QIRL_HD U load_bytes(const uint8_t* p) {
#if QIRL_ISA_LEVEL == 2
  return (U)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)p));
#elif QIRL_ISA_LEVEL == 1
  return (U)_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)p));
#else
  U wide;
  for (int i = 0; i < kLanes; ++i) wide[i] = p[i];
  return wide;
#endif
}

// Largest alignment a streamed store can ask for.
constexpr uintptr_t kStreamAlign = 64;

// Orders streamed stores before whatever the thread publishes next.
QIRL_HD void stream_fence() {
#if QIRL_ISA_LEVEL >= 1 || defined(__SSE4_1__)
  _mm_sfence();
#endif
}

// ---- what the vector types lack ----------------------------------------------------------------

QIRL_HD F square_root(F value) {
#if QIRL_ISA_LEVEL == 2
  return (F)_mm512_sqrt_ps((__m512)value);
#elif QIRL_ISA_LEVEL == 1
  return (F)_mm256_sqrt_ps((__m256)value);
#elif defined(__SSE4_1__)
  return (F)_mm_sqrt_ps((__m128)value);
#else
  for (int i = 0; i < kLanes; ++i) value[i] = __builtin_sqrtf(value[i]);
  return value;
#endif
}

// The smaller (larger) of the two, or x where it is NaN.
QIRL_HD F at_most(F x, F limit) {
#if QIRL_ISA_LEVEL == 2
  return (F)_mm512_min_ps((__m512)limit, (__m512)x);
#elif QIRL_ISA_LEVEL == 1
  return (F)_mm256_min_ps((__m256)limit, (__m256)x);
#elif defined(__SSE4_1__)
  return (F)_mm_min_ps((__m128)limit, (__m128)x);
#else
  return x > limit ? limit : x;
#endif
}

QIRL_HD F at_least(F x, F limit) {
#if QIRL_ISA_LEVEL == 2
  return (F)_mm512_max_ps((__m512)limit, (__m512)x);
#elif QIRL_ISA_LEVEL == 1
  return (F)_mm256_max_ps((__m256)limit, (__m256)x);
#elif defined(__SSE4_1__)
  return (F)_mm_max_ps((__m128)limit, (__m128)x);
#else
  return x < limit ? limit : x;
#endif
}

// Low and high halves of the 64-bit products a * m.
QIRL_HD void multiply_wide(U a, uint32_t m, U& high, U& low) {
#if QIRL_ISA_LEVEL == 2
  const __m512i mm = _mm512_set1_epi64(m);
  const __m512i even = _mm512_mul_epu32((__m512i)a, mm);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64((__m512i)a, 32), mm);
  high = (U)_mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xaaaa, odd);
  low = (U)_mm512_mask_mov_epi32(even, 0xaaaa, _mm512_slli_epi64(odd, 32));
#elif QIRL_ISA_LEVEL == 1
  const __m256i mm = _mm256_set1_epi64x(m);
  const __m256i even = _mm256_mul_epu32((__m256i)a, mm);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64((__m256i)a, 32), mm);
  high = (U)_mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xaa);
  low = (U)_mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xaa);
#elif defined(__SSE4_1__)
  const __m128i mm = _mm_set1_epi64x(m);
  const __m128i even = _mm_mul_epu32((__m128i)a, mm);
  const __m128i odd = _mm_mul_epu32(_mm_srli_epi64((__m128i)a, 32), mm);
  high = (U)_mm_blend_epi16(_mm_srli_epi64(even, 32), odd, 0xcc);
  low = (U)_mm_blend_epi16(even, _mm_slli_epi64(odd, 32), 0xcc);
#else
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = (uint64_t)a[i] * m;
    high[i] = (uint32_t)(product >> 32);
    low[i] = (uint32_t)product;
  }
#endif
}

// From n[k][j] (word k of counter j) to n[q][l] = element q * kLanes + l of the row, where element
// 4 j + k is word k of counter j: a 4 x kLanes transposition.
QIRL_HD void interleave4(F n[4]) {
#if QIRL_ISA_LEVEL == 0
  float flat[4 * kLanes];
  for (int j = 0; j < kLanes; ++j) {
    for (int k = 0; k < 4; ++k) flat[4 * j + k] = n[k][j];
  }
  for (int q = 0; q < 4; ++q) n[q] = load(flat + q * kLanes);
#elif QIRL_ISA_LEVEL == 1
  const __m256 a = (__m256)n[0], b = (__m256)n[1], c = (__m256)n[2], d = (__m256)n[3];
  const __m256d ab_low = (__m256d)_mm256_unpacklo_ps(a, b);
  const __m256d ab_high = (__m256d)_mm256_unpackhi_ps(a, b);
  const __m256d cd_low = (__m256d)_mm256_unpacklo_ps(c, d);
  const __m256d cd_high = (__m256d)_mm256_unpackhi_ps(c, d);
  const __m256 j04 = (__m256)_mm256_unpacklo_pd(ab_low, cd_low);  // counter 0 | counter 4
  const __m256 j15 = (__m256)_mm256_unpackhi_pd(ab_low, cd_low);
  const __m256 j26 = (__m256)_mm256_unpacklo_pd(ab_high, cd_high);
  const __m256 j37 = (__m256)_mm256_unpackhi_pd(ab_high, cd_high);
  n[0] = (F)_mm256_permute2f128_ps(j04, j15, 0x20);
  n[1] = (F)_mm256_permute2f128_ps(j26, j37, 0x20);
  n[2] = (F)_mm256_permute2f128_ps(j04, j15, 0x31);
  n[3] = (F)_mm256_permute2f128_ps(j26, j37, 0x31);
#else
  const __m512 a = (__m512)n[0], b = (__m512)n[1], c = (__m512)n[2], d = (__m512)n[3];
  const __m512d ab_low = (__m512d)_mm512_unpacklo_ps(a, b);
  const __m512d ab_high = (__m512d)_mm512_unpackhi_ps(a, b);
  const __m512d cd_low = (__m512d)_mm512_unpacklo_ps(c, d);
  const __m512d cd_high = (__m512d)_mm512_unpackhi_ps(c, d);
  const __m512 j0 = (__m512)_mm512_unpacklo_pd(ab_low, cd_low);  // counters 0 | 4 | 8 | 12
  const __m512 j1 = (__m512)_mm512_unpackhi_pd(ab_low, cd_low);
  const __m512 j2 = (__m512)_mm512_unpacklo_pd(ab_high, cd_high);
  const __m512 j3 = (__m512)_mm512_unpackhi_pd(ab_high, cd_high);
  const __m512 even01 = _mm512_shuffle_f32x4(j0, j1, 0x88);  // j0: 0, 8 | j1: 1, 9
  const __m512 even23 = _mm512_shuffle_f32x4(j2, j3, 0x88);
  const __m512 odd01 = _mm512_shuffle_f32x4(j0, j1, 0xdd);  // j0: 4, 12 | j1: 5, 13
  const __m512 odd23 = _mm512_shuffle_f32x4(j2, j3, 0xdd);
  n[0] = (F)_mm512_shuffle_f32x4(even01, even23, 0x88);  // 0 1 2 3
  n[1] = (F)_mm512_shuffle_f32x4(odd01, odd23, 0x88);    // 4 5 6 7
  n[2] = (F)_mm512_shuffle_f32x4(even01, even23, 0xdd);  // 8 9 10 11
  n[3] = (F)_mm512_shuffle_f32x4(odd01, odd23, 0xdd);    // 12 13 14 15
#endif
}

// Lanes 2 j and 2 j + 1 change places.
QIRL_HD F swap_pairs(F value) {
#if QIRL_ISA_LEVEL == 2
  return (F)_mm512_permute_ps((__m512)value, 0xb1);
#elif QIRL_ISA_LEVEL == 1
  return (F)_mm256_permute_ps((__m256)value, 0xb1);
#elif defined(__SSE4_1__)
  return (F)_mm_shuffle_ps((__m128)value, (__m128)value, 0xb1);
#else
  F swapped;
  for (int i = 0; i < kLanes; ++i) swapped[i] = value[i ^ 1];
  return swapped;
#endif
}

// Each even lane and its copy in the lane behind it.
QIRL_HD F even_lanes(F value) {
#if QIRL_ISA_LEVEL == 2
  return (F)_mm512_moveldup_ps((__m512)value);
#elif QIRL_ISA_LEVEL == 1
  return (F)_mm256_moveldup_ps((__m256)value);
#elif defined(__SSE4_1__)
  return (F)_mm_shuffle_ps((__m128)value, (__m128)value, 0xa0);
#else
  for (int i = 0; i < kLanes; i += 2) value[i + 1] = value[i];
  return value;
#endif
}

// Each odd lane and its copy in the lane before it.
QIRL_HD F odd_lanes(F value) { return even_lanes(swap_pairs(value)); }

// -1 in even lanes, 1 in odd ones.
QIRL_HD F alternating_signs() {
  F signs;
  for (int i = 0; i < kLanes; ++i) signs[i] = i % 2 == 0 ? -1.0f : 1.0f;
  return signs;
}

// The operations as csrc/math/ wants them.
struct Ops {
  using F = QIRL_ISA::F;
  using I = QIRL_ISA::I;
  using U = QIRL_ISA::U;
  QIRL_HD void multiply_wide(U a, uint32_t m, U& high, U& low) {
    QIRL_ISA::multiply_wide(a, m, high, low);
  }
  QIRL_HD F to_float(I value) { return __builtin_convertvector(value, F); }
  QIRL_HD F at_most(F x, float limit) { return QIRL_ISA::at_most(x, splat(limit)); }
  QIRL_HD F at_least(F x, float limit) { return QIRL_ISA::at_least(x, splat(limit)); }
  QIRL_HD F square_root(F value) { return QIRL_ISA::square_root(value); }
  QIRL_HD U bits(F value) { return (U)value; }
  QIRL_HD F from_bits(U value) { return (F)value; }
};

// `value` with zeros in lane n and behind.
QIRL_HD F first_lanes(int n, F value) { return select(lane_index() < (uint32_t)n, value, F{}); }

// ---- rows whose length is no multiple of kLanes ------------------------------------------------

// The first n elements at p, zeros in the lanes behind them.
template <class T>
QIRL_HD F load_n(const T* p, int n) {
  if (n == kLanes) return load(p);
  T padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load(padded);
}

template <class T>
QIRL_HD void store_n(T* p, F value, int n, bool stream) {
  if (n == kLanes) return store(p, value, stream);
  T padded[kLanes];
  store(padded, value, false);
  for (int i = 0; i < n; ++i) p[i] = padded[i];
}

QIRL_HD void store_bytes_n(uint8_t* p, U value, int n) {
  if (n == kLanes) return store_bytes(p, value);
  for (int i = 0; i < n; ++i) p[i] = (uint8_t)value[i];
}

QIRL_HD U load_bytes_n(const uint8_t* p, int n) {
  if (n == kLanes) return load_bytes(p);
  uint8_t padded[kLanes] = {};
  for (int i = 0; i < n; ++i) padded[i] = p[i];
  return load_bytes(padded);
}

// body(i, n) for each vector of a span: its first index and how many lanes are in use.
template <class Body>
QIRL_HD void for_vectors(int64_t size, Body body) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) body(i, kLanes);
  if (i < size) body(i, (int)(size - i));
}

// ---- sums with an order that depends on the position alone -------------------------------------

// Element i of a block goes to virtual lane i % 16; lanes are added by a fixed tree.
struct Sum16 {
  static constexpr int kParts = 16 / kLanes;
  F lanes[kParts] = {};

  // Adds a vector of elements whose first has index `vector * kLanes` in the block.
  QIRL_INLINE void add(int64_t vector, F value) { lanes[vector % kParts] += value; }

  // Lane i + lane i + 8, then + 4, + 2, + 1.
  QIRL_INLINE float total() const {
#if QIRL_ISA_LEVEL == 0 && !defined(__SSE4_1__)
    float t[16];
    memcpy(t, lanes, sizeof t);
    for (int width = 8; width > 0; width /= 2) {
      for (int i = 0; i < width; ++i) t[i] += t[i + width];
    }
    return t[0];
#else
#if QIRL_ISA_LEVEL == 2
    const __m512 all = (__m512)lanes[0];
    const __m256 eight = _mm512_castps512_ps256(all) + _mm512_extractf32x8_ps(all, 1);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#elif QIRL_ISA_LEVEL == 1
    const __m256 eight = (__m256)(lanes[0] + lanes[1]);
    const __m128 four = _mm256_castps256_ps128(eight) + _mm256_extractf128_ps(eight, 1);
#else
    const __m128 four = (__m128)((lanes[0] + lanes[2]) + (lanes[1] + lanes[3]));
#endif
    const __m128 two = four + _mm_movehl_ps(four, four);
    return two[0] + two[1];
#endif
  }
};

}  // namespace QIRL_ISA
}  // namespace qirl
