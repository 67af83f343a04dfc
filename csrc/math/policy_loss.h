// Clipped policy loss of one sample, and its derivative by logp.
//   r = exp(logp - logp_old),  L = max(-A r, -A clip(r, low, high)),  dL/dlogp = -A r or 0
#pragma once

#include "math/portable.h"

namespace qirl {

template <class T>
struct PolicyTerm {
  T loss;
  T grad;        // dL/dlogp
  bool outside;  // r beyond [low, high], whatever the sign of A
};

// The clipped branch is the larger one, and flat, where r left the interval on A's side. A NaN in
// r or A reaches the loss and the gradient: every comparison with it is false.
template <class T>
QIRL_HD PolicyTerm<T> policy_term(T r, T advantage, T low, T high) {
  const bool above = r > high;
  const bool below = r < low;
  const T clipped = above ? high : (below ? low : r);
  const bool flat = (above && advantage > T(0)) || (below && advantage < T(0));
  const T free = -advantage * r;
  return {flat ? -advantage * clipped : free, flat ? T(0) : free, above || below};
}

}  // namespace qirl
