#include "bindings/qk_norm_rope.h"

#include <pybind11/stl.h>

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

void forward(const Stream& text, const Stream& image, const std::array<Array, 3>& out, float eps,
             uintptr_t stream) {
  QkArgs a = qk_args(text, image, eps);
  require_width(a);
  for (int i = 0; i < 3; ++i) a.out[i] = as_pointer(out[i]);
  check("qk_norm_rope", qk_norm_rope(a, as_pointer(stream)));
}

// dx: of the text's q and k, of q and k. partials, dw: absent when not wanted.
void backward(const Stream& text, const Stream& image, const Array& dQ, const Array& dK,
              const std::array<Array, 4>& dx, const Array& partials, const Array& dw, float eps,
              uintptr_t stream) {
  QkArgs a = qk_args(text, image, eps);
  require_width(a);
  require_dtype(dQ, a.dtype);
  require_dtype(dK, a.dtype);
  a.dy[0] = qk_heads(dQ);
  a.dy[1] = qk_heads(dK);
  for (int i = 0; i < 4; ++i) a.stream[i / 2].dx[i % 2] = as_pointer(dx[i]);
  a.partials = as_pointer<float>(partials);
  a.dw = as_pointer<float>(dw);
  check("qk_norm_rope_backward", qk_norm_rope_backward(a, as_pointer(stream)));
}

const Binding binding([](py::module_& m) {
  m.def("qk_norm_rope", &forward);
  m.def("qk_norm_rope_backward", &backward);
  m.attr("qk_chunk") = kQkChunk;
});

}  // namespace

}  // namespace qirl::cuda
