// The factor that brings a guided token to its conditional norm, as guide and guide_step take it.
#pragma once

#include "cpu/vec.h"
#include "math/guide.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

QIRL_HD float scalar_sqrt(float value) { return __builtin_sqrtf(value); }

template <class T>
QIRL_HD float token_factor(const T* c, const T* u, int64_t width, F w) {
  Sum16 c2, g2;
  for_vectors(width, [&](int64_t i, int n) {
    const F cv = load_n(c + i, n), g = guide_combine(cv, load_n(u + i, n), w);
    c2.add(i / kLanes, cv * cv);
    g2.add(i / kLanes, g * g);
  });
  return guide_factor(c2.total(), g2.total(), scalar_sqrt);
}

}  // namespace
}  // namespace QIRL_ISA
}  // namespace qirl
