#include "cpu/qk_norm_rope.h"

#include <string>
#include <vector>

#include "bindings/cpu/ops.h"
#include "cpu/dtype.h"

namespace qirl {
namespace {

using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; B, S, H strides
using Weight = std::tuple<uintptr_t, int>;                       // address (0: absent), Dtype code
using Rope = std::tuple<uintptr_t, int64_t, int64_t>;            // address; B, S strides in floats
using Outputs = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
// q, k, v; weights of q and k; rope; tokens (0: no such stream).
using Stream = std::tuple<Heads, Heads, Heads, Weight, Weight, Rope, int64_t>;
using Sizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, heads of q, heads of k, width

QkHeads heads_of(const Heads& h) {
  const auto [address, batch, token, head] = h;
  return {as_pointer(address), batch, token, head};
}

QkStream stream_of(const Stream& from, int64_t first) {
  const auto& [q, k, v, q_weight, k_weight, rope, length] = from;
  QkStream s{};
  s.in[0] = heads_of(q);
  s.in[1] = heads_of(k);
  s.in[2] = heads_of(v);
  s.weight[0] = as_pointer(std::get<0>(q_weight));
  s.weight[1] = as_pointer(std::get<0>(k_weight));
  s.weight_dtype[0] = std::get<1>(q_weight);
  s.weight_dtype[1] = std::get<1>(k_weight);
  s.rope = as_pointer<float>(std::get<0>(rope));
  s.rope_strides[0] = std::get<1>(rope);
  s.rope_strides[1] = std::get<2>(rope);
  s.length = length;
  s.first = first;
  return s;
}

QkArgs inputs(const Stream& text, const Stream& image, const Sizes& sizes, float eps, int dtype) {
  const auto [batch, q_heads, k_heads, width] = sizes;
  if (width > kQkMaxWidth) {
    throw py::value_error("qk_norm_rope: backend 'cpu' takes heads of at most " +
                          std::to_string(kQkMaxWidth) + " channels; got " + std::to_string(width) +
                          ". use_backend('reference') takes any width.");
  }
  QkArgs a{};
  a.stream[0] = stream_of(text, 0);
  a.stream[1] = stream_of(image, a.stream[0].length);
  a.batch = batch;
  a.total = a.stream[0].length + a.stream[1].length;
  a.heads[0] = q_heads;
  a.heads[1] = k_heads;
  a.width = width;
  a.eps = eps;
  a.dtype = dtype;
  return a;
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

int64_t tasks_of(const QkArgs& a) {
  return a.batch * (qk_tasks(a.stream[0]) + qk_tasks(a.stream[1]));
}

void forward(const Stream& text, const Stream& image, const Outputs& out, const Sizes& sizes,
             float eps, int dtype, int threads) {
  QkArgs a = inputs(text, image, sizes, eps, dtype);
  a.out[0] = as_pointer(std::get<0>(out));
  a.out[1] = as_pointer(std::get<1>(out));
  a.out[2] = as_pointer(std::get<2>(out));
  a.streamed = streamed(a, a.out, 3, a.total);
  py::gil_scoped_release released;
  run_kernel(qk_norm_rope_kernels, &a, tasks_of(a), 2, threads);
}

// Adds the partial sums of one stream's weight in the order of the tasks.
void finish(const QkArgs& a, int which_stream, int which, float* out) {
  const int64_t first = qk_tasks(a.stream[0]), per_sample = first + qk_tasks(a.stream[1]);
  const int64_t begin = which_stream == 0 ? 0 : first, end = which_stream == 0 ? first : per_sample;
  std::vector<double> sums(a.width, 0.0);
  for (int64_t sample = 0; sample < a.batch; ++sample) {
    for (int64_t task = begin; task < end; ++task) {
      const float* part = a.partials + ((sample * per_sample + task) * 2 + which) * a.width;
      for (int64_t i = 0; i < a.width; ++i) sums[i] += part[i];
    }
  }
  for (int64_t i = 0; i < a.width; ++i) out[i] = static_cast<float>(sums[i]);
}

// dx: gradients of text q, text k, q, k. dw: float32 [4, width] in the same order; 0: not wanted.
void backward(const Stream& text, const Stream& image, const Heads& dQ, const Heads& dK,
              const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& dx, uintptr_t dw,
              const Sizes& sizes, float eps, int dtype, int threads) {
  QkArgs a = inputs(text, image, sizes, eps, dtype);
  a.dy[0] = heads_of(dQ);
  a.dy[1] = heads_of(dK);
  a.stream[0].dx[0] = as_pointer(std::get<0>(dx));
  a.stream[0].dx[1] = as_pointer(std::get<1>(dx));
  a.stream[1].dx[0] = as_pointer(std::get<2>(dx));
  a.stream[1].dx[1] = as_pointer(std::get<3>(dx));
  // One choice for both streams, by the image's size; the text's gradients are small beside it.
  a.streamed = streamed(a, a.stream[1].dx, 2, a.stream[1].length);
  for (void* text_dx : a.stream[0].dx) {
    a.streamed = a.streamed && reinterpret_cast<uintptr_t>(text_dx) % 64 == 0;
  }
  py::gil_scoped_release released;
  std::vector<float> partials(dw ? tasks_of(a) * 2 * a.width : 0);
  a.partials = dw ? partials.data() : nullptr;
  run_kernel(qk_norm_rope_backward_kernels, &a, tasks_of(a), 2, threads);
  for (int i = 0; dw && i < 4; ++i) finish(a, i / 2, i % 2, as_pointer<float>(dw) + i * a.width);
}

const Binding binding([](py::module_& m) {
  m.def("qk_norm_rope", &forward);
  m.def("qk_norm_rope_backward", &backward);
});

}  // namespace

}  // namespace qirl
