#include "cuda/fp8_quantize.h"

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

void quantize(const Array& x, const Array& q, const Array& scale, const Array& amax, int64_t unit,
              int format, bool transposed, uintptr_t stream) {
  Fp8Args args{};
  args.x = x.data;
  args.x_stride = x.stride[0];
  args.dtype = x.dtype();
  args.q = as_pointer<uint8_t>(q);
  args.scale = as_pointer<float>(scale);
  args.amax = as_pointer<uint32_t>(amax);
  args.rows = x.size[0];
  args.width = x.size[1];
  args.unit = unit;
  args.format = format;
  args.transposed = transposed;
  check("fp8_quantize", fp8_quantize(args, as_pointer(stream)));
}

const Binding binding([](py::module_& m) { m.def("fp8_quantize", &quantize); });

}  // namespace

}  // namespace qirl::cuda
