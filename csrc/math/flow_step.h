// One step of any sampler dynamics, its log-probability and derivatives.
//   mean = a x + c v + delta,  x' = mean + s noise,  r = x' - mean,  logp = mean_i(-w r_i^2) - b
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T>
QIRL_HD T flow_mean(T x, T v, T delta, T a, T c) {
  return (a * x + c * v) + delta;
}

template <class T>
QIRL_HD T flow_sample(T mean, T noise, T s) {
  return mean + s * noise;
}

// x_next is the stored value, rounded to its storage type.
template <class T>
QIRL_HD T flow_residual(T x_next, T mean) {
  return x_next - mean;
}

// From the sum of r^2 over a row of n elements. With w = b = 0 (no density) this is +0.
QIRL_HD float flow_log_prob(double sum_r2, int64_t n, float w, float b) {
  return (float)((0.0 - (double)w * (sum_r2 / (double)n)) - (double)b);
}

// d logp / d v_i = (2 w c / n) r_i and d logp / d x_i = (2 w a / n) r_i: the factor of r_i, times
// the incoming gradient.
QIRL_HD float flow_log_prob_slope(float grad, float w, float coefficient, int64_t n) {
  return (float)(2.0 * (double)grad * (double)w * (double)coefficient / (double)n);
}

}  // namespace qirl
