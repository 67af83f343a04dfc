// Group-relative advantages: the scalar formulas.
//   spread  = sqrt(sum (x - mean)^2 / (n - ddof))
//   z       = (x - mean) / (spread + eps), exactly 0 where spread < floor or the divisor vanishes
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T, class Sqrt>
QIRL_HD T advantage_spread(T sum_of_squares, T n, T ddof, Sqrt root) {
  return root(sum_of_squares / (n - ddof));
}

// The divisor of a z-score, 0 where the reward does not count in this group.
template <class T>
QIRL_HD T advantage_divisor(T group_spread, T used_spread, T floor, T eps) {
  return group_spread < floor ? T(0) : used_spread + eps;
}

template <class T>
QIRL_HD T advantage_zscore(T x, T mean, T divisor) {
  return divisor > T(0) ? (x - mean) / divisor : T(0);
}

template <class T>
QIRL_HD T advantage_clamp(T a, T limit) {
  return a > limit ? limit : (a < -limit ? -limit : a);
}

}  // namespace qirl
