#include "cuda/qk_norm_rope.h"

#include <string>

#include "bindings/cuda/ops.h"

namespace qirl::cuda {
namespace {

// As in bindings/cpu/qk_norm_rope.cpp.
using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; B, S, H strides
using Weight = std::tuple<uintptr_t, int>;                       // address (0: absent), Dtype code
using Rope = std::tuple<uintptr_t, int64_t, int64_t>;            // address; B, S strides in floats
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
  if (width % 8 != 0 || width > kQkMaxWidth) {
    throw py::value_error("qk_norm_rope: backend 'cuda' takes heads of a multiple of 8 up to " +
                          std::to_string(kQkMaxWidth) + " channels; got " + std::to_string(width) +
                          ". use_backend('triton') or 'reference' takes any even width.");
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

void forward(const Stream& text, const Stream& image,
             const std::tuple<uintptr_t, uintptr_t, uintptr_t>& out, const Sizes& sizes, float eps,
             int dtype, uintptr_t stream) {
  QkArgs a = inputs(text, image, sizes, eps, dtype);
  a.out[0] = as_pointer(std::get<0>(out));
  a.out[1] = as_pointer(std::get<1>(out));
  a.out[2] = as_pointer(std::get<2>(out));
  check("qk_norm_rope", qk_norm_rope(a, as_pointer(stream)));
}

// dx: gradients of text q, text k, q, k. partials, dw: address 0 when not wanted.
void backward(const Stream& text, const Stream& image, const Heads& dQ, const Heads& dK,
              const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>& dx, uintptr_t partials,
              uintptr_t dw, const Sizes& sizes, float eps, int dtype, uintptr_t stream) {
  QkArgs a = inputs(text, image, sizes, eps, dtype);
  a.dy[0] = heads_of(dQ);
  a.dy[1] = heads_of(dK);
  a.stream[0].dx[0] = as_pointer(std::get<0>(dx));
  a.stream[0].dx[1] = as_pointer(std::get<1>(dx));
  a.stream[1].dx[0] = as_pointer(std::get<2>(dx));
  a.stream[1].dx[1] = as_pointer(std::get<3>(dx));
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
