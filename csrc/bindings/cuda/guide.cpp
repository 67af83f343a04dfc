#include "cuda/guide.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

GuideArgs inputs(const Rows& c, const Rows& u, const Whole& scale_B, bool rescale) {
  GuideArgs args{};
  args.c = c.data;
  args.u = u.data;
  args.c_stride = c.stride[0];
  args.u_stride = u.stride[0];
  args.dtype = c.dtype();
  args.scale_B = as_pointer<float>(scale_B);
  args.rows = c.rows();
  args.row_size = c.row_size();
  args.width = c.last;
  args.rescale = rescale;
  return args;
}

void forward(const Rows& c, const Rows& u, const Whole& scale_B, const Array& out, bool rescale,
             uintptr_t stream) {
  GuideArgs args = inputs(c, u, scale_B, rescale);
  args.out = as_pointer(out);
  check("guide", guide(args, as_pointer(stream)));
}

void backward(const Rows& dy, const Rows& c, const Rows& u, const Whole& scale_B, const Array& dc,
              const Array& du, bool rescale, uintptr_t stream) {
  GuideArgs args = inputs(c, u, scale_B, rescale);
  require_dtype(dy, c.dtype());
  args.dy = dy.data;
  args.dy_stride = dy.stride[0];
  args.out = as_pointer(dc);
  args.out2 = as_pointer(du);
  check("guide_backward", guide_backward(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("guide", &forward);
  m.def("guide_backward", &backward);
});

}  // namespace

}  // namespace qirl::cuda
