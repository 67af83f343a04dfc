#include "cpu/fp8_quantize.h"

#include <algorithm>
#include <string>
#include <vector>

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
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

// Returns q and scale; granularity: "row", "block" or "tensor".
py::tuple quantize(const Matrix& x, const std::string& granularity, bool e5m2, bool transposed,
                   int threads) {
  const int64_t width = x.last, rows = x.count / width;
  Fp8Args a{};
  a.x = x.data;
  a.x_stride = x.step;
  a.dtype = x.dtype();
  a.rows = rows;
  a.width = width;
  a.format = e5m2 ? kE5m2 : kE4m3fn;
  const Fp8Outputs made(transposed ? std::vector<int64_t>{width, rows} : sizes_of(x), granularity,
                        e5m2);
  a.q = made.out.q;
  a.scale = made.out.scale;
  a.unit = made.out.unit;
  a.whole = granularity == "tensor";
  {
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
  return py::make_tuple(made.q.tensor, made.scale.tensor);
}

const Binding binding([](py::module_& m) { m.def("fp8_quantize", &quantize); });

}  // namespace

}  // namespace qirl
