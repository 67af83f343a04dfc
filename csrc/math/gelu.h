// GELU with the tanh approximation, and its derivative.
//   t = 2 sqrt(2/pi) (x + 0.044715 x^3),  y = x s,  s = 1 / (1 + exp(-t)) = (1 + tanh(t/2)) / 2
//   dy/dx = s + x s (1 - s) dt/dx
//
// t is taken at x clamped to [-9.9, 9.9]: beyond, s is 0 or 1 up to 2e-37, and nothing overflows.
#pragma once

#include "math/elementary.h"

namespace qirl {

constexpr float kGeluEdge = 9.9f;
constexpr float kGeluSlope = 1.59576912f;    // 2 sqrt(2/pi)
constexpr float kGeluCubic = 0.0713548163f;  // times 0.044715
constexpr float kGeluSlope2 = 2.30220818f;   // and both over ln 2
constexpr float kGeluCubic2 = 0.102943239f;

// exp(-t)
template <class V>
QIRL_HD typename V::F gelu_decay(typename V::F x, typename V::F x2) {
  return power_of_two<V>(x * (x2 * -kGeluCubic2 - kGeluSlope2));
}

template <class V>
QIRL_HD typename V::F gelu_value(typename V::F x) {
  using F = typename V::F;
  const F above = V::at_least(x, -kGeluEdge), inside = V::at_most(above, kGeluEdge);
  return above / (1.0f + gelu_decay<V>(inside, inside * inside));
}

template <class V>
QIRL_HD typename V::F gelu_slope(typename V::F x) {
  using F = typename V::F;
  const F inside = V::at_most(V::at_least(x, -kGeluEdge), kGeluEdge), x2 = inside * inside;
  const F e = gelu_decay<V>(inside, x2), s = 1.0f / (1.0f + e);
  const F dt = x2 * (3.0f * kGeluCubic) + kGeluSlope;
  return s + (inside * dt) * (s * (e * s));  // e s = 1 - s
}

}  // namespace qirl
