#include "cpu/fp8_quantize.h"

#include <algorithm>
#include <vector>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"
#include "math/fp8.h"

namespace qirl {
namespace {

constexpr int64_t kGrainElements = 16384;

// One scale from the largest finite magnitude of all of x.
void whole_scale(Fp8Args& a, int64_t grain, int threads) {
  std::vector<uint32_t> amax(static_cast<size_t>(a.rows));
  a.amax = amax.data();
  run_kernel(fp8_amax_kernels, &a, a.rows, grain, threads);
  const float most = ScalarOps::from_bits(*std::max_element(amax.begin(), amax.end()));
  a.scale[0] = a.format == kE4m3fn ? fp8_scale<E4m3fn>(most) : fp8_scale<E5m2>(most);
}

// unit: elements a scale along a row of q; 0: one scale for everything.
void quantize(const Array& x, const Array& q, const Array& scale, int64_t unit, int format,
              bool transposed, int threads) {
  const int64_t rows = x.size[0], width = x.size[1];
  Fp8Args a{};
  a.x = x.data;
  a.x_stride = x.stride[0];
  a.dtype = x.dtype();
  a.q = as_pointer<uint8_t>(q);
  a.scale = as_pointer<float>(scale);
  a.rows = rows;
  a.width = width;
  a.whole = unit == 0;
  a.unit = a.whole ? (transposed ? rows : width) : unit;
  a.format = format;
  py::gil_scoped_release released;
  const int64_t grain = std::max<int64_t>(1, kGrainElements / width);
  if (a.whole) whole_scale(a, grain, threads);
  if (transposed) {
    run_kernel(fp8_quantize_transposed_kernels, &a, (width + kFp8Columns - 1) / kFp8Columns, 1,
               threads);
  } else {
    run_kernel(fp8_quantize_kernels, &a, rows, grain, threads);
  }
}

const Binding binding([](py::module_& m) { m.def("fp8_quantize", &quantize); });

}  // namespace

}  // namespace qirl
