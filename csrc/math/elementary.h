// exp, log, tanh and sigmoid of float32, the same bits on host vectors, host scalars and devices.
//
// Within 2 ulp of the exact value everywhere, results below 2^-126 (denormals) included: measured
// maxima are exp 0.78, log 0.85, tanh 1.50, sigmoid 1.83 ulp. NaN stays NaN; exp(-inf) = 0,
// exp(inf) = inf and log(0) = -inf exactly; exp overflows to inf where float32 does; log of a
// negative is NaN.
//
// Polynomials are minimax fits made for these ranges (rel. error below 0.1 ulp). V names the vector
// (or scalar) operations, as in philox.h, and at_most, at_least (x itself where it is NaN):
// cpu/vec.h's Ops, or ScalarOps below.
#pragma once

#include <string.h>

#include "math/portable.h"

namespace qirl {

// The operations on one float, for host and device.
struct ScalarOps {
  using F = float;
  using I = int32_t;
  using U = uint32_t;
  QIRL_HD void multiply_wide(U a, uint32_t m, U& high, U& low) {
    const uint64_t product = (uint64_t)a * m;
    high = (U)(product >> 32);
    low = (U)product;
  }
  QIRL_HD F to_float(I value) { return (F)value; }
  QIRL_HD F at_most(F x, float limit) { return x > limit ? limit : x; }
  QIRL_HD F at_least(F x, float limit) { return x < limit ? limit : x; }
  QIRL_HD F square_root(F value) {
#if defined(__CUDA_ARCH__)
    return __fsqrt_rn(value);
#else
    return __builtin_sqrtf(value);
#endif
  }
  QIRL_HD U bits(F value) {
#if defined(__CUDA_ARCH__)
    return __float_as_uint(value);
#else
    U out;
    memcpy(&out, &value, sizeof out);
    return out;
#endif
  }
  QIRL_HD F from_bits(U value) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(value);
#else
    F out;
    memcpy(&out, &value, sizeof out);
    return out;
#endif
  }
};

// mask: what a comparison of two V::F gives. Never a branch.
template <class M, class F>
QIRL_HD F choose(M mask, F yes, F no) {
  return mask ? yes : no;
}

template <class V>
QIRL_HD typename V::F constant(float value) {
  return value - typename V::F{};
}

template <class V>
QIRL_HD typename V::F magnitude(typename V::F x) {
  return V::from_bits(V::bits(x) & 0x7fffffffu);
}

// For x in [-104.5, 89] or NaN. exp(x) = 2^n exp(r), n = x / ln 2 to the nearest, |r| <= ln 2 / 2,
// exp(r) = 1 + r + r^2 P(r). 2^n is applied in two steps, so that a denormal result is rounded
// once.
template <class V>
QIRL_HD typename V::F exponential_in_range(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  using U = typename V::U;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const F shifted = x * 1.44269504f + kRound;
  const F n = shifted - kRound;
  // ln 2 = 0.693359375 - 2.1219444e-4. `high` is exact; what rounding r loses enters r^2 P alone,
  // and what 1 + high loses is put back: one rounding in all but name.
  const F high = x - n * 0.693359375f, low = n * -2.12194440e-4f;
  const F r = high - low;
  F p = r * 0.00138216966f + 0.00836867001f;
  p = p * r + 0.0416682549f;
  p = p * r + 0.166665211f;
  p = p * r + 0.49999994f;
  const F sum = high + 1.0f, lost = high - (sum - 1.0f);
  p = sum + (((r * r) * p - low) + lost);
  const I power = (I)V::bits(shifted) - 0x4b400000;
  const I half = power >> 1;
  const F first = V::from_bits((U)(half + 127) << 23);
  const F second = V::from_bits((U)(power - half + 127) << 23);
  return (p * first) * second;
}

template <class V>
QIRL_HD typename V::F exponential(typename V::F x) {
  return exponential_in_range<V>(V::at_least(V::at_most(x, 89.0f), -104.5f));
}

// exp(-|x|)
template <class V>
QIRL_HD typename V::F exponential_decay(typename V::F x) {
  return exponential_in_range<V>(V::at_least(-magnitude<V>(x), -104.5f));
}

// ln(x): x = 2^e (1 + t), 1 + t in [sqrt(1/2), sqrt(2)); ln(1 + t) = t - t^2/2 + t^3 P(t).
template <class V>
QIRL_HD typename V::F logarithm(typename V::F x) {
  using F = typename V::F;
  using I = typename V::I;
  using U = typename V::U;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const F scaled = choose(x < 1.17549435e-38f, x * 8388608.0f, x);  // denormals: by 2^23
  const F bias = choose(x < 1.17549435e-38f, constant<V>(23.0f), F{});
  const I shifted = (I)(V::bits(scaled) - (uint32_t)kSqrtHalf);  // wraps where x is negative
  const F e = V::to_float(shifted >> 23) - bias;
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
  F y = ((small - t2 * 0.5f) + t) + e * 0.693359375f;
  y = choose(x > 3.40282347e+38f, x, y);                              // inf
  y = choose(x > 0.0f, y, V::from_bits(V::bits(F{}) | 0x7fc00000u));  // negative
  y = choose(x == 0.0f, V::from_bits(V::bits(F{}) | 0xff800000u), y);
  return choose(x == x, y, x);
}

// By e = exp(-|x|) <= 1: nothing overflows, and both tails keep their digits. What rounding 1 + e
// loses is put back (2.3 ulp otherwise).
template <class V>
QIRL_HD typename V::F sigmoid(typename V::F x) {
  using F = typename V::F;
  const F e = exponential_decay<V>(x);
  const F sum = 1.0f + e, lost = e - (sum - 1.0f);
  const F y = choose(x < 0.0f, e, constant<V>(1.0f)) / sum;
  return y - (y * lost) / sum;
}

// 2^x for -125 <= x <= 125, within 3 ulp: half the operations of exponential(), for sums of the
// kind 1 + 2^x in activations. NaN gives any value: the caller multiplies by its NaN.
template <class V>
QIRL_HD typename V::F power_of_two(typename V::F x) {
  using F = typename V::F;
  using U = typename V::U;
  constexpr float kRound = 12582912.0f;
  const F shifted = x + kRound;
  const F r = x - (shifted - kRound);  // exact, |r| <= 1/2
  const F r2 = r * r;
  const F p = (r * 0.00132740685f + 0.00967149716f) * r2 + (r * 0.055507008f + 0.240222424f);
  const F y = p * r2 + (r * 0.693147004f + 1.0f);
  return V::from_bits(V::bits(y) + (U)(V::bits(shifted) << 23));  // the integer is in the low bits
}

// |x| < 0.55: x + x^3 P(x^2); beyond: sign(x) (1 - e) / (1 + e) with e = exp(-2 |x|).
template <class V>
QIRL_HD typename V::F hyperbolic_tangent(typename V::F x) {
  using F = typename V::F;
  const F a = magnitude<V>(x), z = a * a;
  F p = z * -0.00626189634f + 0.0210620109f;
  p = p * z - 0.053849645f;
  p = p * z + 0.133325562f;
  p = p * z - 0.333333164f;
  const F near = a + (a * z) * p;
  const F e = exponential_decay<V>(a + a);
  const F far = (1.0f - e) / (1.0f + e);
  const F y = choose(a < 0.55f, near, far);
  return V::from_bits(V::bits(y) | (V::bits(x) & 0x80000000u));
}

}  // namespace qirl
