#include "bindings/qk_norm_rope.h"

#include <string>
#include <vector>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"
#include "cpu/qk_norm_rope.h"

namespace qirl {
namespace {

void require_width(const QkArgs& a) {
  if (a.width <= kQkMaxWidth) return;
  throw py::value_error("qk_norm_rope: backend 'cpu' takes heads of at most " +
                        std::to_string(kQkMaxWidth) + " channels; got " + std::to_string(a.width) +
                        ". use_backend('reference') takes any width.");
}

// Whether each of these outputs of `tokens` tokens is large, aligned, and made of whole lines.
bool streamed(const QkArgs& a, void* const* outputs, int count, int64_t tokens) {
  const int64_t line = a.width * dtype_bytes(a.dtype);
  bool all = line % 64 == 0;
  for (int i = 0; i < count; ++i) {
    if (outputs[i] == nullptr) continue;
    all = all && worth_streaming(outputs[i], a.heads[i > 0] * line, a.batch * tokens);
  }
  return all;
}

void forward(const Stream& text, const Stream& image, const QkOutputs& out, float eps,
             int threads) {
  QkArgs a = qk_forward_args(text, image, out, eps);
  require_width(a);
  a.streamed = streamed(a, a.out, 3, a.total);
  py::gil_scoped_release released;
  run_kernel(qk_norm_rope_kernels, &a, a.batch * qk_chunks(a), 2, threads);
}

// Adds the partial sums of one stream's weight in the order of the chunks.
void finish(const QkArgs& a, int which_stream, int which) {
  const int64_t first = qk_chunks(a.stream[0]), per_sample = qk_chunks(a);
  const int64_t begin = which_stream == 0 ? 0 : first, end = which_stream == 0 ? first : per_sample;
  std::vector<double> sums(a.width, 0.0);
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const float* part = a.partials + ((sample * per_sample + chunk) * 2 + which) * a.width;
      for (int64_t i = 0; i < a.width; ++i) sums[i] += part[i];
    }
  }
  float* out = a.dw + (which_stream * 2 + which) * a.width;
  for (int64_t i = 0; i < a.width; ++i) out[i] = static_cast<float>(sums[i]);
}

void backward(const Stream& text, const Stream& image, const Array& dQ, const Array& dK,
              const QkGradients& dx, const Array& partials, const Array& dw, float eps,
              int threads) {
  QkArgs a = qk_backward_args(text, image, dQ, dK, dx, partials, dw, eps);
  require_width(a);
  // One choice for both streams, by the image's size; the text's gradients are small beside it.
  a.streamed = streamed(a, a.stream[1].dx, 2, a.stream[1].length);
  for (void* text_dx : a.stream[0].dx) {
    a.streamed = a.streamed && reinterpret_cast<uintptr_t>(text_dx) % 64 == 0;
  }
  py::gil_scoped_release released;
  run_kernel(qk_norm_rope_backward_kernels, &a, a.batch * qk_chunks(a), 2, threads);
  for (int i = 0; a.dw && i < 4; ++i) finish(a, i / 2, i % 2);
}

const Binding binding([](py::module_& m) {
  m.def("qk_norm_rope", &forward);
  m.def("qk_norm_rope_backward", &backward);
  m.attr("qk_chunk") = kQkChunk;
});

}  // namespace

}  // namespace qirl
