// Adaptive normalisation, gated residual, and their derivatives, element by element.
//   xhat = (x - mean) rstd            mean = 0 for RMSNorm
//   y    = xhat (1 + scale) + shift
//   out  = residual + f u             f = gate or tanh(gate)
// rstd = 1 / sqrt(v + eps), v the mean of (x - mean)^2.
#pragma once

#include "math/elementary.h"

namespace qirl {

// From the sum of (x - mean)^2 over a row of `width` elements.
template <class Sqrt>
QIRL_HD float norm_rstd(float sum_squares, int64_t width, float eps, Sqrt root) {
  return 1.0f / root(sum_squares / (float)width + eps);
}

template <class T>
QIRL_HD T norm_hat(T x, T mean, T rstd) {
  return (x - mean) * rstd;
}

// factor = 1 + scale; shift is 0 where there is none.
template <class T>
QIRL_HD T norm_modulated(T xhat, T factor, T shift) {
  return xhat * factor + shift;
}

// With g = dy (1 + scale): dx = rstd (g - mean(g) - xhat mean(g xhat)); mean(g) = 0 for RMSNorm.
template <class T>
QIRL_HD T norm_dx(T g, T xhat, T mean_g, T mean_g_xhat, T rstd) {
  return rstd * ((g - mean_g) - xhat * mean_g_xhat);
}

template <class T>
QIRL_HD T gate_add(T residual, T f, T u) {
  return residual + f * u;
}

// tanh'(gate) = 1 - tanh(gate)^2, which cancels far from 0; there 4 e / (1 + e)^2 with
// e = exp(-2 |gate|).
template <class V>
QIRL_HD typename V::F gate_tanh_slope(typename V::F gate) {
  using F = typename V::F;
  const F f = hyperbolic_tangent<V>(gate), e = exponential_decay<V>(gate + gate), sum = e + 1.0f;
  const F near = constant<V>(1.0f) - f * f, far = (e * 4.0f) / (sum * sum);
  return choose(magnitude<V>(gate) < 0.55f, near, far);
}

// sum += value; what its rounding loses is added to `lost` (Knuth's TwoSum).
template <class T>
QIRL_HD void add_exactly(T& sum, T& lost, T value) {
  const T next = sum + value, part = next - sum;
  lost += (sum - (next - part)) + (value - part);
  sum = next;
}

}  // namespace qirl
