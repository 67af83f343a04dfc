// RMSNorm of a head followed by a rotation of its interleaved pairs, and the derivatives.
//   n = x r w,  r = 1 / sqrt(sum x^2 / width + eps)
//   y_even = n_even c - n_odd s,  y_odd = n_odd c + n_even s
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T, class Sqrt>
QIRL_HD T qk_scale(T sum_x2, T width, T eps, Sqrt root) {
  return T(1) / root(sum_x2 / width + eps);
}

template <class T, class S>
QIRL_HD T qk_normed(T x, S r, T w) {
  return (x * r) * w;
}

// One element of a rotated pair: `other` is its partner, signed_s is -s for the even element and s
// for the odd one. The gradient of the rotation is the same with the opposite sign.
template <class T>
QIRL_HD T qk_rotated(T own, T other, T c, T signed_s) {
  return own * c + other * signed_s;
}

// mean over the head of dn * x r, from sum of dn * x.
template <class T>
QIRL_HD T qk_grad_mean(T dot_dn_x, T r, T width) {
  return dot_dn_x * r / width;
}

// dx given normed = x r and its gradient dn.
template <class T, class S>
QIRL_HD T qk_grad(T normed, T dn, S r, S mean) {
  return r * (dn - normed * mean);
}

}  // namespace qirl
