#include "cpu/fp8_linear.h"

#include <algorithm>

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"

namespace qirl {
namespace {

constexpr int64_t kGrainElements = 65536;

// q scale in float32. unit: elements a scale along a row; 0: one scale for everything.
py::object widen(const Whole& q, const Whole& scale, int64_t unit, bool e5m2, int threads) {
  const int64_t rows = q.size[0], width = q.size[1];
  const Output out = output_like(q, kFloat32);
  Fp8WidenArgs a{};
  a.q = as_pointer<const uint8_t>(q);
  a.scale = as_pointer<const float>(scale);
  a.out = out.as<float>();
  a.rows = rows;
  a.width = width;
  a.whole = unit == 0;
  a.unit = a.whole ? width : unit;
  a.e5m2 = e5m2;
  {
    py::gil_scoped_release released;
    run_kernel(fp8_widen_kernels, &a, rows, std::max<int64_t>(1, kGrainElements / width), threads);
  }
  return out.tensor;
}

const Binding binding([](py::module_& m) { m.def("fp8_widen", &widen); });

}  // namespace

}  // namespace qirl
