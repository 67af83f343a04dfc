// Classifier-free guidance with the optional norm rescale of Qwen-Image, and its derivatives.
//   g = u + w (c - u)             plain
//   y = g |c| / |g|               rescaled; |.| is the 2-norm over the last dimension
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T>
QIRL_HD T guide_combine(T c, T u, T w) {
  return u + w * (c - u);
}

// Factor |c| / |g| from the sums of squares; 0 where g vanishes (the direction is undefined there).
template <class T, class Sqrt>
QIRL_HD T guide_factor(T sum_c2, T sum_g2, Sqrt root) {
  return sum_g2 > T(0) ? root(sum_c2) / root(sum_g2) : T(0);
}

// d/dg of <dy, f g> with f = |c| / |g|:  f dy - k g,  k = f <g, dy> / |g|^2.
template <class T>
QIRL_HD T guide_grad_k(T factor, T dot_g_dy, T sum_g2) {
  return sum_g2 > T(0) ? factor * dot_g_dy / sum_g2 : T(0);
}

// d/dc of <dy, f g> through |c| alone:  m c,  m = <g, dy> / (|c| |g|) = f <g, dy> / |c|^2.
template <class T>
QIRL_HD T guide_grad_m(T factor, T dot_g_dy, T sum_c2) {
  return sum_c2 > T(0) ? factor * dot_g_dy / sum_c2 : T(0);
}

}  // namespace qirl
