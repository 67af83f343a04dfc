#include "cpu/guide.h"

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

GuideArgs inputs(const Rows& c, const Rows& u, const Whole& scale_B, bool rescale) {
  GuideArgs a{};
  a.c = c.data;
  a.u = u.data;
  a.c_stride = c.stride[0];
  a.u_stride = u.stride[0];
  a.dtype = c.dtype();
  require_dtype(u, a.dtype);
  a.scale_B = as_pointer<float>(scale_B);
  a.row_size = c.row_size();
  a.width = c.last;
  a.rescale = rescale;
  require_finite("guide", "scale", a.scale_B, c.rows());
  return a;
}

void run(const Kernel (&table)[kIsaCount], GuideArgs& a, bool stream, int64_t rows, int threads) {
  const int64_t unit = a.rescale ? a.width : kGuideBlock;
  a.stream = stream && unit * dtype_bytes(a.dtype) % 64 == 0;
  const int64_t tasks = rows * ((a.row_size + unit - 1) / unit);
  const int64_t grain = 4 * ((kGuideBlock + unit - 1) / unit);
  py::gil_scoped_release released;
  run_kernel(table, &a, tasks, grain, threads);
}

py::object forward(const Rows& c, const Rows& u, const Whole& scale_B, bool rescale, int threads) {
  GuideArgs a = inputs(c, u, scale_B, rescale);
  const Output out = output_like(c, a.dtype);
  a.out = out.data;
  run(guide_kernels, a, streams(out, c, a.dtype), c.rows(), threads);
  return out.tensor;
}

// Returns dc and du.
py::tuple backward(const Rows& dy, const Rows& c, const Rows& u, const Whole& scale_B, bool rescale,
                   int threads) {
  GuideArgs a = inputs(c, u, scale_B, rescale);
  const Output dc = output_like(c, a.dtype), du = output_like(c, a.dtype);
  require_dtype(dy, a.dtype);
  a.dy = dy.data;
  a.dy_stride = dy.stride[0];
  a.out = dc.data;
  a.out2 = du.data;
  run(guide_backward_kernels, a, streams(dc, c, a.dtype) && streams(du, c, a.dtype), c.rows(),
      threads);
  return py::make_tuple(dc.tensor, du.tensor);
}

const Binding binding([](py::module_& m) {
  m.def("guide", &forward);
  m.def("guide_backward", &backward);
});

}  // namespace

}  // namespace qirl
