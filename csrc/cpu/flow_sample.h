// What flow_step and guide_step share: draw the noise, take the step, round to storage, score what
// was stored.
#pragma once

#include "cpu/flow_block.h"
#include "math/philox.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

constexpr int kWays = QIRL_ISA_LEVEL == 2 ? 2 : 4;
constexpr int kVectors = 4 * kWays;        // vectors whose noise is drawn together
constexpr int kGroup = kVectors * kLanes;  // their elements

// Noise of elements [first, first + kGroup) of a row, in order. 4 divides `first`.
QIRL_HD void draw_noise(int64_t first, int64_t seed, int64_t offset, F noise[kVectors]) {
  U group[kWays];
  F drawn[kWays][4];
  for (int w = 0; w < kWays; ++w) group[w] = (uint32_t)(first / 4 + w * kLanes) + lane_index();
  normals4<Ops, kWays>(group, seed, offset, drawn);
  for (int w = 0; w < kWays; ++w) {
    interleave4(drawn[w]);
    for (int q = 0; q < 4; ++q) noise[4 * w + q] = drawn[w][q];
  }
}

// x' of one block and the sum of its squared residuals; mean(i, n) of elements [i, i + n).
template <class X, class V, class Mean>
QIRL_HD float sample_block(const FlowArgs& args, const Block<X, V>& block, Mean mean_at) {
  const F s = splat(args.s_B[block.row]);
  X* out = (X*)args.x_next_out + block.out;
  Sum16 sum;
  auto step = [&](int64_t i, int n, F noise) {
    const F mean = mean_at(i, n);
    const F x_next = round_as(out, flow_sample(mean, noise, s));
    store_n(out + i, x_next, n, args.stream);
    F r = flow_residual(x_next, mean);
    if (n < kLanes) r = first_lanes(n, r);
    sum.add(i / kLanes, r * r);
  };
  for (int64_t first = 0; first < block.size; first += kGroup) {
    F noise[kVectors];
    draw_noise(block.first + first, args.seed_B[block.row], args.offset, noise);
    for (int q = 0; q < kVectors; ++q) {
      const int64_t i = first + q * kLanes, left = block.size - i;
      if (left >= kLanes) {
        step(i, kLanes, noise[q]);
      } else {
        if (left > 0) step(i, (int)left, noise[q]);
        break;
      }
    }
  }
  return sum.total();
}

}  // namespace
}  // namespace QIRL_ISA
}  // namespace qirl
