// How qk_norm_rope crosses from Python, for the CPU and the GPU alike.
#pragma once

#include "bindings/bind.h"
#include "math/qk_args.h"

namespace qirl {

using Heads = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address; B, S, H strides
using Weight = std::tuple<uintptr_t, int>;                       // address (0: absent), Dtype code
using Rope = std::tuple<uintptr_t, int64_t, int64_t>;            // address; B, S strides in floats
// q, k, v; weights of q and k; rope; tokens (0: no such stream).
using Stream = std::tuple<Heads, Heads, Heads, Weight, Weight, Rope, int64_t>;
using QkOutputs = std::tuple<uintptr_t, uintptr_t, uintptr_t>;
using QkGradients = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // text q, k; q, k
using QkSizes = std::tuple<int64_t, int64_t, int64_t, int64_t>;  // B, heads of q, of k, width

inline QkHeads qk_heads(const Heads& h) {
  const auto [address, batch, token, head] = h;
  return {as_pointer(address), batch, token, head};
}

inline QkStream qk_stream(const Stream& from, int64_t first) {
  const auto& [q, k, v, q_weight, k_weight, rope, length] = from;
  QkStream s{};
  s.in[0] = qk_heads(q);
  s.in[1] = qk_heads(k);
  s.in[2] = qk_heads(v);
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

inline QkArgs qk_args(const Stream& text, const Stream& image, const QkSizes& sizes, float eps,
                      int dtype) {
  QkArgs a{};
  a.stream[0] = qk_stream(text, 0);
  a.stream[1] = qk_stream(image, a.stream[0].length);
  a.total = a.stream[0].length + a.stream[1].length;
  std::tie(a.batch, a.heads[0], a.heads[1], a.width) = sizes;
  a.eps = eps;
  a.dtype = dtype;
  return a;
}

inline QkArgs qk_forward_args(const Stream& text, const Stream& image, const QkOutputs& out,
                              const QkSizes& sizes, float eps, int dtype) {
  QkArgs a = qk_args(text, image, sizes, eps, dtype);
  a.out[0] = as_pointer(std::get<0>(out));
  a.out[1] = as_pointer(std::get<1>(out));
  a.out[2] = as_pointer(std::get<2>(out));
  return a;
}

// partials, dw: address 0 when not wanted.
inline QkArgs qk_backward_args(const Stream& text, const Stream& image, const Heads& dQ,
                               const Heads& dK, const QkGradients& dx, uintptr_t partials,
                               uintptr_t dw, const QkSizes& sizes, float eps, int dtype) {
  QkArgs a = qk_args(text, image, sizes, eps, dtype);
  a.dy[0] = qk_heads(dQ);
  a.dy[1] = qk_heads(dK);
  a.stream[0].dx[0] = as_pointer(std::get<0>(dx));
  a.stream[0].dx[1] = as_pointer(std::get<1>(dx));
  a.stream[1].dx[0] = as_pointer(std::get<2>(dx));
  a.stream[1].dx[1] = as_pointer(std::get<3>(dx));
  a.partials = as_pointer<float>(partials);
  a.dw = as_pointer<float>(dw);
  return a;
}

}  // namespace qirl
