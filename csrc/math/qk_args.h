// Arguments of the qk_norm_rope kernels, for the CPU and the GPU alike.
#pragma once

#include <stdint.h>

namespace qirl {

// Heads [B, S, H, width], width contiguous; strides in elements.
struct QkHeads {
  const void* data;
  int64_t batch_stride, token_stride, head_stride;
};

// One of the two streams of tokens.
struct QkStream {
  QkHeads in[3];            // q, k, v; backward: q, k
  const void* weight[2];    // of q and k; null: ones
  const float* rope;        // pairs (cos, sin); null: no rotation
  void* dx[2];              // backward: contiguous gradients of q and k
  int64_t rope_strides[2];  // of a sample and of a token, in floats
  int64_t length;           // tokens; 0: no such stream
  int64_t first;            // where its tokens begin in the joint buffers
  int weight_dtype[2];
};

struct QkArgs {
  QkStream stream[2];
  void* out[3];     // forward: Q, K, V [B, total, H, width], contiguous; V null: not wanted
  QkHeads dy[2];    // backward: gradients of Q and K
  float* partials;  // backward: [B][chunk][q, k][width] sums for the weights; null: not wanted
  float* dw;        // backward: [text q, text k, q, k][width]
  int64_t batch, total, heads[2], width;
  float eps;
  int dtype;
  bool streamed;  // CPU: past the caches
};

// Tokens of one stream of one sample whose sums are one partial; fewer at the end of the stream.
constexpr int64_t kQkChunk = 8;

inline int64_t qk_chunks(const QkStream& s) { return (s.length + kQkChunk - 1) / kQkChunk; }

// Of one sample: the text's chunks come first.
inline int64_t qk_chunks(const QkArgs& a) {
  return qk_chunks(a.stream[0]) + qk_chunks(a.stream[1]);
}

}  // namespace qirl
