// guide_step: guide and flow_step in one pass, with the bits of the two one after the other.
#include "cpu/guide_step.h"

#include "cpu/flow_sample.h"
#include "cpu/token_factor.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

// The guided velocity of one block, rounded to storage, goes to `guided` in float32.
template <class V>
QIRL_HD void guide_block(const GuideStepArgs& g, int64_t row, int64_t first, int64_t size,
                         float* guided) {
  const V* c = (const V*)g.flow.v + row * g.flow.v_stride;
  const V* u = (const V*)g.u + row * g.u_stride;
  const F w = splat(g.scale_B[row]);
  const int64_t last = first + size, unit = g.rescale ? g.width : size;
  int64_t start = g.rescale ? first / unit * unit : first;  // of the token
  for (int64_t at = first; at < last; start += unit) {
    const int64_t stop = start + unit < last ? start + unit : last;
    const float factor = g.rescale ? token_factor(c + start, u + start, unit, w) : 1.0f;
    for_vectors(stop - at, [&](int64_t i, int n) {
      F v = guide_combine(load_n(c + at + i, n), load_n(u + at + i, n), w);
      if (g.rescale) v *= factor;
      store_n(guided + (at - first) + i, round_as(c, v), n, false);
    });
    at = stop;
  }
}

template <class X, class V>
QIRL_HD float guided_step(const GuideStepArgs& g, const Block<X, V>& block) {
  alignas(64) float guided[kFlowBlock];
  guide_block<V>(g, block.row, block.first, block.size, guided);
  X* delta_out = g.delta_out ? (X*)g.delta_out + block.out : nullptr;
  return sample_block(g.flow, block, [&](int64_t i, int n) {
    F v = load_n(guided + i, n), delta = {};
    if (delta_out) {
      const F conditional = load_n(block.v + i, n);
      delta = round_as(delta_out, block.c * (v - conditional));
      store_n(delta_out + i, delta, n, g.flow.stream);
      v = conditional;
    }
    return flow_mean(load_n(block.x + i, n), v, delta, block.a, block.c);
  });
}

}  // namespace

const char* guide_step(const void* arguments, int64_t begin, int64_t end) {
  const GuideStepArgs& g = *(const GuideStepArgs*)arguments;
  with_storage_types(g.flow, [&](auto* x, auto* v) {
    for (int64_t task = begin; task < end; ++task) {
      g.flow.sums[task] = guided_step(g, block_of(g.flow, task, x, v));
    }
  });
  if (g.flow.stream) stream_fence();
  return kIsaName;
}

}  // namespace QIRL_ISA
}  // namespace qirl
