// Quantisation to 8-bit floats: the scale of a span and the conversion of a float.
//   amax  = largest |x| among the finite ones
//   scale = max(amax / largest, 2^-126), 1 where amax = 0
//   q     = x / scale, as x times the rounded 1 / scale, clamped to +-largest, to nearest even
// NaN gives NaN; inf gives NaN in e4m3fn, which has no inf, and inf in e5m2.
#pragma once

#include "math/elementary.h"

namespace qirl {

struct E4m3fn {
  static constexpr int kMantissa = 3;
  static constexpr uint32_t kBias = 7, kInfBits = 0x7f;
  static constexpr float kLargest = 448.0f;
  static constexpr float kSmallestNormal = 0.015625f;  // 2^-6
  static constexpr float kDenormal = 16384.0f;         // its ulp is the step of the denormals, 2^-9
};

struct E5m2 {
  static constexpr int kMantissa = 2;
  static constexpr uint32_t kBias = 15, kInfBits = 0x7c;
  static constexpr float kLargest = 57344.0f;
  static constexpr float kSmallestNormal = 6.10351562e-5f;  // 2^-14
  static constexpr float kDenormal = 128.0f;                // 2^-16
};

template <class Format>
QIRL_HD float fp8_scale(float amax) {
  const float scale = amax / Format::kLargest;
  return amax > 0.0f ? (scale < 1.17549435e-38f ? 1.17549435e-38f : scale) : 1.0f;
}

// The 8 bits of q = x inverse_scale in the low byte. kFinite: no x is an inf or NaN.
template <class V, class Format, bool kFinite = false>
QIRL_HD typename V::U fp8_bits(typename V::F x, typename V::F inverse_scale) {
  using F = typename V::F;
  using U = typename V::U;
  constexpr int kShift = 23 - Format::kMantissa;
  const U x_bits = V::bits(x), sign = (x_bits >> 24) & 0x80u;
  const F y = V::at_most(magnitude<V>(x * inverse_scale), Format::kLargest);
  const U bits = V::bits(y);
  const U rounded = bits + ((1u << (kShift - 1)) - 1u) + ((bits >> kShift) & 1u);
  const U normal = (rounded >> kShift) - ((127u - Format::kBias) << Format::kMantissa);
  const U denormal = V::bits(y + Format::kDenormal) - V::bits(constant<V>(Format::kDenormal));
  U q = choose(y < Format::kSmallestNormal, denormal, normal);
  if (kFinite) return q | sign;
  const U x_magnitude = x_bits & 0x7fffffffu, zero = x_bits ^ x_bits;
  q = choose(x_magnitude >= 0x7f800000u, zero | Format::kInfBits, q);
  q = choose(x_magnitude > 0x7f800000u, zero | 0x7fu, q);
  return q | sign;
}

// The float that the low byte of q stands for; exact.
template <class V, class Format>
QIRL_HD typename V::F fp8_value(typename V::U q) {
  using F = typename V::F;
  using U = typename V::U;
  constexpr uint32_t kOne = 1u << Format::kMantissa;  // the smallest normal number
  const U magnitude = q & 0x7fu;
  const F normal =
      V::from_bits((magnitude << (23 - Format::kMantissa)) + ((127u - Format::kBias) << 23));
  const F whole = V::from_bits(magnitude | 0x4b000000u) - 8388608.0f;  // 2^23: magnitude as a float
  const F denormal = whole * (Format::kSmallestNormal / kOne);
  U bits = choose(magnitude < kOne, V::bits(denormal), V::bits(normal));
  if (Format::kInfBits == 0x7cu) bits = choose(magnitude == 0x7cu, (q ^ q) | 0x7f800000u, bits);
  bits =
      choose(magnitude > (Format::kInfBits == 0x7cu ? 0x7cu : 0x7eu), (q ^ q) | 0x7fc00000u, bits);
  return V::from_bits(bits | ((q & 0x80u) << 24));
}

}  // namespace qirl
