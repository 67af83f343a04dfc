// SwiGLU and its derivatives.
//   y = silu(g) u,  silu(g) = g s,  s = 1 / (1 + exp(-g))
//   du = dy silu(g),  dg = dy u (s + g s (1 - s))
//
// exp is taken at g clamped to [-85, 85]: beyond, s is 0 or 1 up to 2e-37, and nothing overflows.
#pragma once

#include "math/elementary.h"

namespace qirl {

constexpr float kSwigluEdge = 85.0f;

template <class V>
QIRL_HD typename V::F swiglu_decay(typename V::F gate) {
  return power_of_two<V>(gate * -1.44269504f);
}

template <class V>
QIRL_HD typename V::F swiglu_value(typename V::F gate, typename V::F up) {
  using F = typename V::F;
  const F above = V::at_least(gate, -kSwigluEdge), inside = V::at_most(above, kSwigluEdge);
  return (above / (1.0f + swiglu_decay<V>(inside))) * up;
}

template <class V>
QIRL_HD void swiglu_gradients(typename V::F dy, typename V::F gate, typename V::F up,
                              typename V::F& dgate, typename V::F& dup) {
  using F = typename V::F;
  const F above = V::at_least(gate, -kSwigluEdge), inside = V::at_most(above, kSwigluEdge);
  const F e = swiglu_decay<V>(inside), s = 1.0f / (1.0f + e);
  dup = dy * (above * s);
  dgate = (dy * up) * (s + (inside * s) * (e * s));  // e s = 1 - s
}

}  // namespace qirl
