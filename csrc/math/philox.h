// Counter-based normal noise: Philox4x32-10 and Box-Muller.
//
// Noise of element i of a row depends on (seed, offset, i) alone:
//   key = (seed low, seed high), counter = (i / 4, 0, offset low, offset high),
//   words (0, 1) give elements 4j and 4j + 1, words (2, 3) give 4j + 2 and 4j + 3.
// A pair of words (p, q) becomes r cos(t), r sin(t) with r = sqrt(-2 ln u), u = ((p >> 8) + 1) /
// 2^24 in (0, 1], t = 2 pi (q >> 8) / 2^24; |noise| <= sqrt(48 ln 2) = 5.77. Within 4 ulp of the
// float64 value, and the same bits on every target: see portable.h.
//
// Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
//
// V names the vector (or scalar) operations: types F, I, U of 32-bit lanes; multiply_wide,
// to_float, square_root, bits (F to U) and from_bits (U to F).
#pragma once

#include "math/portable.h"

namespace qirl {

// kWays independent counters advance together: the multiplies of one hide the latency of another.
template <class V, int kWays, class U>
QIRL_HD void philox4x32_10(U (*c)[4], uint32_t key0, uint32_t key1) {
  for (int round = 0; round < 10; ++round) {
    for (int w = 0; w < kWays; ++w) {
      U high0, low0, high1, low1;
      V::multiply_wide(c[w][0], 0xD2511F53u, high0, low0);
      V::multiply_wide(c[w][2], 0xCD9E8D57u, high1, low1);
      c[w][0] = high1 ^ c[w][1] ^ key0;
      c[w][2] = high0 ^ c[w][3] ^ key1;
      c[w][1] = low1;
      c[w][3] = low0;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

// ln(k / 2^24) for an integer-valued float 1 <= k <= 2^24. k = 2^e (1 + t), 1 + t in
// [sqrt(1/2), sqrt(2)); ln(1 + t) = t - t^2/2 + t^3 P(t) with P minimax (0.1 ulp).
template <class V, class F>
QIRL_HD F log_of_24_bits(F k) {
  using I = typename V::I;
  using U = typename V::U;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const I shifted = (I)V::bits(k) - kSqrtHalf;
  const F e = V::to_float((shifted >> 23) - 24);
  const F t = V::from_bits((U)((shifted & 0x7fffff) + kSqrtHalf)) - 1.0f;
  F p = t * -0.0763449296f + 0.12761575f;
  p = p * t - 0.131601825f;
  p = p * t + 0.142017588f;
  p = p * t - 0.166233569f;
  p = p * t + 0.200012267f;
  p = p * t - 0.250008196f;
  p = p * t + 0.333333313f;
  const F t2 = t * t;
  const F small = (t * t2) * p + e * -2.12194440e-4f;
  // ln 2 = 0.693359375 - 2.1219444e-4: the first part times e is exact.
  return ((small - t2 * 0.5f) + t) + e * 0.693359375f;
}

// sin and cos of 2 pi turns / 2^24 for an integer 0 <= turns < 2^24: the nearest quarter turn is
// taken off in integers, the rest g in [-1/2, 1/2] quarter turns goes through minimax polynomials.
template <class V, class U, class F>
QIRL_HD void sincos_of_turns(U turns, F& sine, F& cosine) {
  using I = typename V::I;
  const U quarter = (turns + (1u << 21)) >> 22;
  const F g = V::to_float((I)(turns - (quarter << 22))) * 2.38418579e-7f;  // 2^-22
  const F z = g * g;
  const F s = g * (((z * -0.00460531004f + 0.0796815827f) * z - 0.645963669f) * z + 1.57079637f);
  const F c =
      (((z * 0.000904021668f - 0.0208602883f) * z + 0.253669232f) * z - 1.23370051f) * z + 1.0f;
  const U s_bits = V::bits(s), c_bits = V::bits(c);
  const U odd = 0u - (quarter & 1u);  // an odd number of quarter turns swaps the two
  const U swapped = (s_bits ^ c_bits) & odd;
  sine = V::from_bits((s_bits ^ swapped) ^ ((quarter & 2u) << 30));
  cosine = V::from_bits((c_bits ^ swapped) ^ (((quarter + 1u) & 2u) << 30));
}

template <class V, class U, class F>
QIRL_HD void box_muller(U p, U q, F& first, F& second) {
  const F log_u = log_of_24_bits<V>(V::to_float((typename V::I)((p >> 8) + 1u)));
  const F radius = V::square_root(log_u * -2.0f);
  F sine, cosine;
  sincos_of_turns<V>(q >> 8, sine, cosine);
  first = radius * cosine;
  second = radius * sine;
}

// noise[w][k] = noise of element 4 * group[w] + k, for each lane of group[w].
template <class V, int kWays, class U, class F>
QIRL_HD void normals4(const U* group, int64_t seed, int64_t offset, F (*noise)[4]) {
  U c[kWays][4];
  for (int w = 0; w < kWays; ++w) {
    const U zero = group[w] ^ group[w];
    c[w][0] = group[w];
    c[w][1] = zero;
    c[w][2] = zero | (uint32_t)offset;
    c[w][3] = zero | (uint32_t)((uint64_t)offset >> 32);
  }
  philox4x32_10<V, kWays>(c, (uint32_t)seed, (uint32_t)((uint64_t)seed >> 32));
  for (int w = 0; w < kWays; ++w) {
    box_muller<V>(c[w][0], c[w][1], noise[w][0], noise[w][1]);
    box_muller<V>(c[w][2], c[w][3], noise[w][2], noise[w][3]);
  }
}

}  // namespace qirl
