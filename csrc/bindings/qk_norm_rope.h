// How qk_norm_rope crosses from Python, for the CPU and the GPU alike.
#pragma once

#include <string>

#include "bindings/bind.h"
#include "math/qk_args.h"

namespace qirl {

// q, k, v; weights of q and k; rope. A stream without q is absent.
using Stream = std::tuple<Array, Array, Array, Array, Array, Array>;

// The code of a weight's dtype; ValueError for one that the kernels do not read.
inline int qk_weight_dtype(const Array& weight) {
  if (weight.code >= 0) return weight.code;
  throw py::value_error(
      "qk_norm_rope: weights must be float32 or bfloat16 for a compiled backend; got " +
      py::str(weight.tensor.attr("dtype")).cast<std::string>() +
      ". Cast, or use_backend('reference').");
}

inline QkHeads qk_heads(const Array& h) { return {h.data, h.stride[0], h.stride[1], h.stride[2]}; }

inline QkStream qk_stream(const Stream& from, int64_t first) {
  const auto& [q, k, v, q_weight, k_weight, rope] = from;
  QkStream s{};
  s.in[0] = qk_heads(q);
  s.in[1] = qk_heads(k);
  s.in[2] = qk_heads(v);
  s.weight[0] = q_weight.data;
  s.weight[1] = k_weight.data;
  s.weight_dtype[0] = qk_weight_dtype(q_weight);
  s.weight_dtype[1] = qk_weight_dtype(k_weight);
  s.rope = as_pointer<float>(rope);  // complex: two floats an element
  s.rope_strides[0] = rope.dims == 3 ? 2 * rope.stride[0] : 0;
  s.rope_strides[1] = 2 * rope.stride[rope.dims == 3];
  s.length = q.size[1];
  s.first = first;
  return s;
}

inline QkArgs qk_args(const Stream& text, const Stream& image, float eps) {
  QkArgs a{};
  a.stream[0] = qk_stream(text, 0);
  a.stream[1] = qk_stream(image, a.stream[0].length);
  a.total = a.stream[0].length + a.stream[1].length;
  const Array &q = std::get<0>(image), &k = std::get<1>(image);
  a.batch = q.size[0];
  a.heads[0] = q.size[2];
  a.heads[1] = k.size[2];
  a.width = q.last;
  a.eps = eps;
  a.dtype = q.dtype();
  return a;
}

}  // namespace qirl
