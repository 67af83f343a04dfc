#include "cpu/guide.h"

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

GuideArgs inputs(const Array& c, const Array& u, const Array& scale_B, bool rescale) {
  GuideArgs a{};
  a.c = c.data;
  a.u = u.data;
  a.c_stride = c.stride[0];
  a.u_stride = u.stride[0];
  a.dtype = c.dtype();
  a.scale_B = as_pointer<float>(scale_B);
  a.row_size = c.row_size();
  a.width = c.last;
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

void forward(const Array& c, const Array& u, const Array& scale_B, const Array& out, bool rescale,
             int threads) {
  GuideArgs a = inputs(c, u, scale_B, rescale);
  a.out = as_pointer(out);
  run(guide_kernels, a, c.rows(), threads);
}

void backward(const Array& dy, const Array& c, const Array& u, const Array& scale_B,
              const Array& dc, const Array& du, bool rescale, int threads) {
  GuideArgs a = inputs(c, u, scale_B, rescale);
  a.dy = dy.data;
  a.dy_stride = dy.stride[0];
  a.out = as_pointer(dc);
  a.out2 = as_pointer(du);
  run(guide_backward_kernels, a, c.rows(), threads);
}

const Binding binding([](py::module_& m) {
  m.def("guide", &forward);
  m.def("guide_backward", &backward);
});

}  // namespace

}  // namespace qirl
