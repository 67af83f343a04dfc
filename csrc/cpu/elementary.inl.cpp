// The functions of math/elementary.h over an array, so that tests can measure them.
#include "cpu/elementary.h"

#include "cpu/vec.h"
#include "math/elementary.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <class V>
QIRL_HD typename V::F apply(int function, typename V::F x) {
  switch (function) {
    case kExp:
      return exponential<V>(x);
    case kLog:
      return logarithm<V>(x);
    case kTanh:
      return hyperbolic_tangent<V>(x);
    default:
      return sigmoid<V>(x);
  }
}

}  // namespace

const char* elementary(const void* args, int64_t begin, int64_t end) {
  const ElementaryArgs& a = *(const ElementaryArgs*)args;
  if (a.scalar) {
    for (int64_t i = begin; i < end; ++i) a.y[i] = apply<ScalarOps>(a.function, a.x[i]);
    return kIsaName;
  }
  for_vectors(end - begin, [&](int64_t i, int n) {
    store_n(a.y + begin + i, apply<Ops>(a.function, load_n(a.x + begin + i, n)), n, false);
  });
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
