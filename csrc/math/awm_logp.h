// Pseudo log-probability of advantage weighted matching, and its derivative.
//   r = v - (noise - x0),  m = mean_i r^2,  logp = -factor t^time_power f(m)
//   f(m) = m, or (m + tiny)^power - tiny^power
#pragma once

#include "math/portable.h"

namespace qirl {

constexpr double kAwmTiny = 1e-10;

struct AwmForm {
  int time_power;  // 0, 1 or 2
  double power;    // 1: f(m) = m
  double factor;
};

struct AwmRow {
  float logp;
  float slope;  // d logp / d v_i = slope r_i
};

template <class T>
QIRL_HD T awm_residual(T v, T noise, T x0) {
  return v - (noise - x0);
}

// From the sum of r^2 over a row of n elements. `raise(x, y)` is x^y in double.
template <class Raise>
QIRL_HD AwmRow awm_row(double sum_r2, int64_t n, float time, const AwmForm& form, Raise raise) {
  const double m = sum_r2 / (double)n, t = (double)time;
  const double weight = form.factor * (form.time_power == 0   ? 1.0
                                       : form.time_power == 1 ? t
                                                              : t * t);
  double value = m, derivative = 1.0;
  if (form.power != 1.0) {
    value = raise(m + kAwmTiny, form.power) - raise(kAwmTiny, form.power);
    derivative = form.power * raise(m + kAwmTiny, form.power - 1.0);
  }
  return {(float)(0.0 - weight * value), (float)(0.0 - weight * derivative * (2.0 / (double)n))};
}

}  // namespace qirl
