// fp8_linear on a CPU: 8-bit floats back to float32, for sgemm. A task is a row.
#include "cpu/fp8_linear.h"

#include "cpu/vec.h"
#include "math/fp8.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

template <class Format>
QIRL_HD void widen_rows(const Fp8WidenArgs& a, int64_t begin, int64_t end) {
  const int64_t units = (a.width + a.unit - 1) / a.unit;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t u = 0; u < units; ++u) {
      const int64_t at = u * a.unit, left = a.width - at, first = row * a.width + at;
      const F scale = splat(a.scale[a.whole ? 0 : row * units + u]);
      for_vectors(left < a.unit ? left : a.unit, [&](int64_t i, int n) {
        const F value = fp8_value<Ops, Format>(load_bytes_n(a.q + first + i, n));
        store_n(a.out + first + i, value * scale, n, false);
      });
    }
  }
}

}  // namespace

const char* fp8_widen(const void* args, int64_t begin, int64_t end) {
  const Fp8WidenArgs& a = *(const Fp8WidenArgs*)args;
  a.e5m2 ? widen_rows<E5m2>(a, begin, end) : widen_rows<E4m3fn>(a, begin, end);
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
