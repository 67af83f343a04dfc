// Mean squared distance of a velocity from its target, and its derivative.
//   mse_b = mean_i (v - target)^2,  loss = mean_b weight_b mse_b
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T>
QIRL_HD T velocity_error(T v, T target) {
  return v - target;
}

// d loss / d v_i = slope (v_i - target_i), n elements a row.
QIRL_HD float velocity_slope(float weight, int64_t n, int64_t rows) {
  return (float)(2.0 * (double)weight / ((double)n * (double)rows));
}

}  // namespace qirl
