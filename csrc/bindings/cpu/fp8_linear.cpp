#include "cpu/fp8_linear.h"

#include <algorithm>

#include "bindings/cpu/ops.h"

namespace qirl {
namespace {

constexpr int64_t kGrainElements = 65536;

// unit: elements a scale along a row; 0: one scale for everything.
void widen(const Array& q, const Whole& scale, const Array& out, int64_t unit, bool e5m2,
           int threads) {
  const int64_t rows = q.size[0], width = q.size[1];
  Fp8WidenArgs a{};
  a.q = as_pointer<const uint8_t>(q);
  a.scale = as_pointer<const float>(scale);
  a.out = as_pointer<float>(out);
  a.rows = rows;
  a.width = width;
  a.whole = unit == 0;
  a.unit = a.whole ? width : unit;
  a.e5m2 = e5m2;
  py::gil_scoped_release released;
  run_kernel(fp8_widen_kernels, &a, rows, std::max<int64_t>(1, kGrainElements / width), threads);
}

const Binding binding([](py::module_& m) { m.def("fp8_widen", &widen); });

}  // namespace

}  // namespace qirl
