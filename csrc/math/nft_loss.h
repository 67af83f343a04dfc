// DiffusionNFT's loss of one row and its derivative, see qirl_fast/ops/nft_loss.py.
//   y = x_t - x0 - sigma v_old,  d = sigma beta (v - v_old),  e+ = y - d,  e- = y + d
#pragma once

#include "math/portable.h"

namespace qirl {

constexpr double kNftFloor = 1e-5;  // of w+ and w-

template <class T>
struct NftErrors {
  T better, worse;  // e+, e-
};

// sigma_beta = sigma beta, rounded once for the row.
template <class T>
QIRL_HD NftErrors<T> nft_errors(T v, T v_old, T x_t, T x0, T sigma, T sigma_beta) {
  const T y = (x_t - x0) - sigma * v_old;
  const T d = sigma_beta * (v - v_old);
  return {y - d, y + d};
}

// d loss / d v from the row's slopes; away = v - v_ref.
template <class T>
QIRL_HD T nft_gradient(const NftErrors<T>& e, T away, T better, T worse, T ref) {
  return (better * e.better + worse * e.worse) + ref * away;
}

// Sums over a row: |e+|, |e-|, e+^2, e-^2, (v - v_ref)^2.
constexpr int kNftSums = 5;

struct NftOptions {
  double beta, adv_clip, ref_weight;
};

// policy and the mean squares, as the metrics; slopes: dv = better e+ + worse e- + ref (v - v_ref).
struct NftRow {
  double policy, better_mse, worse_mse, ref_mse;
  float better_slope, worse_slope, ref_slope;
};

// A NaN passes: every comparison with it is false.
QIRL_HD double nft_weight(double mean_abs) { return mean_abs < kNftFloor ? kNftFloor : mean_abs; }

QIRL_HD NftRow nft_row(const double (&sums)[kNftSums], int64_t n, int64_t rows, float sigma,
                       float advantage, const NftOptions& o) {
  const double size = (double)n, a = (double)advantage / o.adv_clip;
  const double p = 0.5 + 0.5 * (a < -1.0 ? -1.0 : a > 1.0 ? 1.0 : a);
  const double better_weight = nft_weight(sums[0] / size),
               worse_weight = nft_weight(sums[1] / size);
  NftRow row;
  row.better_mse = sums[2] / size;
  row.worse_mse = sums[3] / size;
  row.ref_mse = sums[4] / size;
  row.policy = o.adv_clip / o.beta *
               (p * row.better_mse / better_weight + (1.0 - p) * row.worse_mse / worse_weight);
  const double scale = 2.0 / (size * (double)rows), pull = scale * o.adv_clip * (double)sigma;
  row.better_slope = (float)(0.0 - pull * p / better_weight);
  row.worse_slope = (float)(pull * (1.0 - p) / worse_weight);
  row.ref_slope = (float)(scale * o.ref_weight);
  return row;
}

// What the row adds to B times the loss.
QIRL_HD double nft_term(const NftRow& row, const NftOptions& o) {
  return row.policy + o.ref_weight * row.ref_mse;
}

}  // namespace qirl
