#include "cuda/guide.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

GuideArgs inputs(const Rows& c, const Rows& u, uintptr_t scale_B, int64_t rows, int64_t row_size,
                 int64_t width, bool rescale) {
  GuideArgs args{};
  args.c = address_of(c);
  args.u = address_of(u);
  args.c_stride = stride_of(c);
  args.u_stride = stride_of(u);
  args.dtype = dtype_of(c);
  args.scale_B = as_pointer<float>(scale_B);
  args.rows = rows;
  args.row_size = row_size;
  args.width = width;
  args.rescale = rescale;
  return args;
}

void forward(const Rows& c, const Rows& u, uintptr_t scale_B, uintptr_t out, int64_t rows,
             int64_t row_size, int64_t width, bool rescale, uintptr_t stream) {
  GuideArgs args = inputs(c, u, scale_B, rows, row_size, width, rescale);
  args.out = as_pointer(out);
  check("guide", guide(args, as_pointer(stream)));
}

void backward(const Rows& dy, const Rows& c, const Rows& u, uintptr_t scale_B, uintptr_t dc,
              uintptr_t du, int64_t rows, int64_t row_size, int64_t width, bool rescale,
              uintptr_t stream) {
  GuideArgs args = inputs(c, u, scale_B, rows, row_size, width, rescale);
  args.dy = address_of(dy);
  args.dy_stride = stride_of(dy);
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
