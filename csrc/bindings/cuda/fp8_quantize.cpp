#include "cuda/fp8_quantize.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

void quantize(const Rows& x, uintptr_t q, uintptr_t scale, uintptr_t amax, int64_t rows,
              int64_t width, int64_t unit, int format, bool transposed, uintptr_t stream) {
  Fp8Args args{};
  args.x = address_of(x);
  args.x_stride = stride_of(x);
  args.dtype = dtype_of(x);
  args.q = as_pointer<uint8_t>(q);
  args.scale = as_pointer<float>(scale);
  args.amax = as_pointer<uint32_t>(amax);
  args.rows = rows;
  args.width = width;
  args.unit = unit;
  args.format = format;
  args.transposed = transposed;
  check("fp8_quantize", fp8_quantize(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("fp8_quantize", &quantize); });

}  // namespace

}  // namespace qirl::cuda
