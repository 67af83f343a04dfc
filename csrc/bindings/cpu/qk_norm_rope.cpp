#include "bindings/qk_norm_rope.h"

#include <string>
#include <vector>

#include "bindings/cpu/ops.h"
#include "bindings/cpu/outputs.h"
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

// The buffers that joint attention wants: text first, image behind it.
Output joint(const Array& t, int64_t total) {
  return new_output({t.size[0], total, t.size[2], t.size[3]}, t.dtype());
}

// Returns Q, K and, with text, V.
py::tuple forward(const Vectors& q, const Vectors& k, const Vectors& v, const Whole& q_weight,
                  const Whole& k_weight, const Vectors& rope, const Vectors& text_q,
                  const Vectors& text_k, const Vectors& text_v, const Whole& text_q_weight,
                  const Whole& text_k_weight, const Vectors& text_rope, float eps, int threads) {
  QkArgs a = qk_args({text_q, text_k, text_v, text_q_weight, text_k_weight, text_rope},
                     {q, k, v, q_weight, k_weight, rope}, eps);
  require_width(a);
  const bool has_text = text_q.data != nullptr;
  const Output out[] = {joint(q, a.total), joint(k, a.total),
                        has_text ? joint(k, a.total) : no_output(a.dtype)};
  for (int i = 0; i < 3; ++i) a.out[i] = out[i].data;
  a.streamed = streamed(a, a.out, 3, a.total);
  {
    py::gil_scoped_release released;
    run_kernel(qk_norm_rope_kernels, &a, a.batch * qk_chunks(a), 2, threads);
  }
  return py::make_tuple(out[0].tensor, out[1].tensor, out[2].tensor);
}

// Adds the partial sums of one stream's weight in the order of the chunks; out null: not wanted.
void finish(const QkArgs& a, int which_stream, int which, float* out) {
  if (out == nullptr) return;
  const int64_t first = qk_chunks(a.stream[0]), per_sample = qk_chunks(a);
  const int64_t begin = which_stream == 0 ? 0 : first, end = which_stream == 0 ? first : per_sample;
  std::vector<double> sums(a.width, 0.0);
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const float* part = a.partials + ((sample * per_sample + chunk) * 2 + which) * a.width;
      for (int64_t i = 0; i < a.width; ++i) sums[i] += part[i];
    }
  }
  for (int64_t i = 0; i < a.width; ++i) out[i] = static_cast<float>(sums[i]);
}

// Gradient of one of a stream's weights in its dtype, from the float32 that finish() made.
py::object weight_gradient(const Array& weight, const Output& dw) {
  if (weight.data == nullptr) return no_output(kFloat32).tensor;
  if (dw.data == nullptr) return no_output(weight.dtype()).tensor;
  return dw.tensor.attr("to")(weight.tensor.attr("dtype"));
}

// Returns the gradients of q, k and their weights, then those of the text stream's; the absent and
// the unwanted ones have no elements.
py::tuple backward(const Vectors& dQ, const Vectors& dK, const Vectors& q, const Vectors& k,
                   const Whole& q_weight, const Whole& k_weight, const Vectors& rope,
                   const Vectors& text_q, const Vectors& text_k, const Whole& text_q_weight,
                   const Whole& text_k_weight, const Vectors& text_rope, float eps,
                   bool want_weights, int threads) {
  QkArgs a = qk_args({text_q, text_k, {}, text_q_weight, text_k_weight, text_rope},
                     {q, k, {}, q_weight, k_weight, rope}, eps);
  require_width(a);
  require_dtype(dQ, a.dtype);
  require_dtype(dK, a.dtype);
  a.dy[0] = qk_heads(dQ);
  a.dy[1] = qk_heads(dK);
  const Array* const heads[2][2] = {{&text_q, &text_k}, {&q, &k}};
  const Array* const weights[2][2] = {{&text_q_weight, &text_k_weight}, {&q_weight, &k_weight}};
  Output dx[2][2], dw[2][2], partials;
  for (int s = 0; s < 2; ++s) {
    for (int i = 0; i < 2; ++i) {
      dx[s][i] = heads[s][i]->data ? output_like(*heads[s][i], a.dtype) : no_output(a.dtype);
      a.stream[s].dx[i] = dx[s][i].data;
      if (want_weights && weights[s][i]->data) dw[s][i] = new_output({a.width}, kFloat32);
    }
  }
  if (want_weights) {
    partials = new_output({a.batch, qk_chunks(a), 2, a.width}, kFloat32);
    a.partials = partials.as<float>();
  }
  // One choice for both streams, by the image's size; the text's gradients are small beside it.
  a.streamed = streamed(a, a.stream[1].dx, 2, a.stream[1].length);
  for (void* text_dx : a.stream[0].dx) {
    a.streamed = a.streamed && reinterpret_cast<uintptr_t>(text_dx) % 64 == 0;
  }
  {
    py::gil_scoped_release released;
    run_kernel(qk_norm_rope_backward_kernels, &a, a.batch * qk_chunks(a), 2, threads);
    for (int s = 0; s < 2; ++s) {
      for (int i = 0; i < 2; ++i) finish(a, s, i, dw[s][i].as<float>());
    }
  }
  py::object results[2][4];
  for (int s = 0; s < 2; ++s) {
    for (int i = 0; i < 2; ++i) {
      results[s][i] = dx[s][i].tensor;
      results[s][2 + i] = weight_gradient(*weights[s][i], dw[s][i]);
    }
  }
  const auto& [text, image] = results;
  return py::make_tuple(image[0], image[1], image[2], image[3], text[0], text[1], text[2], text[3]);
}

const Binding binding([](py::module_& m) {
  m.def("qk_norm_rope", &forward);
  m.def("qk_norm_rope_backward", &backward);
});

}  // namespace

}  // namespace qirl
