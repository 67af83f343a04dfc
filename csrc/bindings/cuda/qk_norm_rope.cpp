#include "bindings/qk_norm_rope.h"

#include <string>

#include "bindings/cuda/ops.h"
#include "cuda/qk_norm_rope.h"

namespace qirl::cuda {
namespace {

void require_width(const QkArgs& a) {
  if (a.width % 8 == 0 && a.width <= kQkMaxWidth) return;
  throw py::value_error("qk_norm_rope: backend 'cuda' takes heads of a multiple of 8 up to " +
                        std::to_string(kQkMaxWidth) + " channels; got " + std::to_string(a.width) +
                        ". use_backend('triton') or 'reference' takes any even width.");
}

void forward(const Stream& text, const Stream& image, const QkOutputs& out, float eps,
             uintptr_t stream) {
  const QkArgs a = qk_forward_args(text, image, out, eps);
  require_width(a);
  check("qk_norm_rope", qk_norm_rope(a, as_pointer(stream)));
}

void backward(const Stream& text, const Stream& image, const Array& dQ, const Array& dK,
              const QkGradients& dx, const Array& partials, const Array& dw, float eps,
              uintptr_t stream) {
  const QkArgs a = qk_backward_args(text, image, dQ, dK, dx, partials, dw, eps);
  require_width(a);
  check("qk_norm_rope_backward", qk_norm_rope_backward(a, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("qk_norm_rope", &forward);
  m.def("qk_norm_rope_backward", &backward);
  m.attr("qk_chunk") = kQkChunk;
});

}  // namespace

}  // namespace qirl::cuda
