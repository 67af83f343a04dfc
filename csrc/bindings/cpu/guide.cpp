#include "cpu/guide.h"

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

GuideArgs inputs(const Rows& c, const Rows& u, uintptr_t scale_B, int64_t row_size, int64_t width,
                 bool rescale) {
  GuideArgs a{};
  a.c = address_of(c);
  a.u = address_of(u);
  a.c_stride = stride_of(c);
  a.u_stride = stride_of(u);
  a.dtype = dtype_of(c);
  a.scale_B = as_pointer<float>(scale_B);
  a.row_size = row_size;
  a.width = width;
  a.rescale = rescale;
  return a;
}

void run(const Kernel (&table)[kIsaCount], GuideArgs& a, int64_t rows, int threads) {
  require_finite("guide", "scale", a.scale_B, rows);
  const int64_t unit = a.rescale ? a.width : kGuideBlock;
  const int64_t row_bytes = a.row_size * dtype_bytes(a.dtype);
  a.stream = unit * dtype_bytes(a.dtype) % 64 == 0 && worth_streaming(a.out, row_bytes, rows) &&
             (a.out2 == nullptr || worth_streaming(a.out2, row_bytes, rows));
  const int64_t tasks = rows * ((a.row_size + unit - 1) / unit);
  const int64_t grain = 4 * ((kGuideBlock + unit - 1) / unit);
  py::gil_scoped_release released;
  run_kernel(table, &a, tasks, grain, threads);
}

void forward(const Rows& c, const Rows& u, uintptr_t scale_B, uintptr_t out, int64_t rows,
             int64_t row_size, int64_t width, bool rescale, int threads) {
  GuideArgs a = inputs(c, u, scale_B, row_size, width, rescale);
  a.out = as_pointer(out);
  run(guide_kernels, a, rows, threads);
}

void backward(const Rows& dy, const Rows& c, const Rows& u, uintptr_t scale_B, uintptr_t dc,
              uintptr_t du, int64_t rows, int64_t row_size, int64_t width, bool rescale,
              int threads) {
  GuideArgs a = inputs(c, u, scale_B, row_size, width, rescale);
  a.dy = address_of(dy);
  a.dy_stride = stride_of(dy);
  a.out = as_pointer(dc);
  a.out2 = as_pointer(du);
  run(guide_backward_kernels, a, rows, threads);
}

const Binding binding([](py::module_& m) {
  m.def("guide", &forward);
  m.def("guide_backward", &backward);
});

}  // namespace

}  // namespace qirl
