// norm_modulate, gate_residual and the two in one pass.
#include "cpu/norm_rows.h"

namespace qirl {
namespace QIRL_ISA {
namespace {

QIRL_HD float scalar_sqrt(float value) { return __builtin_sqrtf(value); }

// The token's values in float32 go to scratch in the first pass, from where the second (squared
// deviations, LayerNorm only) and the last read them.
template <bool kGated, bool kNorm, class T, class V>
QIRL_HD void forward_token(const NormArgs& a, const NormScratch& scratch, int64_t token,
                           bool at_t0) {
  const int64_t at = token * a.width;
  const T* x = element<const T>(a.x, at);
  const V* u = element<const V>(a.u, at);
  const float* f = scratch.row(at_t0, kGate);
  T* out = element<T>(a.out, at);
  float* kept = scratch.token();
  const bool rms = a.mean == nullptr;
  using Sum = SumWays<4>;
  Sum first, second;
  for_parts<Sum::kParts>(a.width, [&](int64_t i, int n, int part) {
    F v = load_n(x + i, n);
    if (kGated) {
      v = round_as(out, gate_add(v, load(f + i), load_n(u + i, n)));
      store_n(out + i, v, n, a.stream);
    }
    if (kNorm) {
      store(kept + i, v, false);
      first.add(part, rms ? v * v : v);
    }
  });
  if (!kNorm) return;
  const float mean = rms ? 0.0f : first.total() / (float)a.width;
  const F mean_v = splat(mean);
  if (!rms) {
    for_parts<Sum::kParts>(a.width, [&](int64_t i, int n, int part) {
      F centred = load(kept + i) - mean_v;
      if (n < kLanes) centred = first_lanes(n, centred);
      second.add(part, centred * centred);
    });
    a.mean[token] = mean;
  }
  const float squares = rms ? first.total() : second.total();
  const float rstd = norm_rstd(squares, a.width, a.eps, scalar_sqrt);
  a.rstd[token] = rstd;
  const F rstd_v = splat(rstd);
  const float *factor = scratch.row(at_t0, kScale), *shift = scratch.row(at_t0, kShift);
  T* y = element<T>(a.y, at);
  for_vectors(a.width, [&](int64_t i, int n) {
    const F xhat = norm_hat(load(kept + i), mean_v, rstd_v);
    const F value = norm_modulated(xhat, load(factor + i), load(shift + i));
    store_n(y + i, round_as(y, value), n, a.stream);
  });
}

template <bool kGated, bool kNorm, class T, class V>
void forward_chunks(const NormArgs& a, int64_t begin, int64_t end) {
  NormScratch scratch(a);
  for_chunks(a, begin, end, [&](int64_t sample, int64_t, int64_t first, int64_t last) {
    scratch.prepare(a, sample);
    for (int64_t t = first; t < last; ++t) {
      forward_token<kGated, kNorm, T, V>(a, scratch, sample * a.tokens + t,
                                         token_at_t0(a, sample, t));
    }
  });
  if (a.stream) stream_fence();
}

template <bool kNorm>
const char* gated_forward(const void* args, int64_t begin, int64_t end) {
  const NormArgs& a = *(const NormArgs*)args;
  const bool wide_u = a.u_dtype == kFloat32;
  if (a.x_dtype == kFloat32) {
    wide_u ? forward_chunks<true, kNorm, float, float>(a, begin, end)
           : forward_chunks<true, kNorm, float, bf16>(a, begin, end);
  } else {
    wide_u ? forward_chunks<true, kNorm, bf16, float>(a, begin, end)
           : forward_chunks<true, kNorm, bf16, bf16>(a, begin, end);
  }
  return kIsaName;
}

}  // namespace

const char* norm_modulate(const void* args, int64_t begin, int64_t end) {
  const NormArgs& a = *(const NormArgs*)args;
  a.x_dtype == kFloat32 ? forward_chunks<false, true, float, float>(a, begin, end)
                        : forward_chunks<false, true, bf16, bf16>(a, begin, end);
  return kIsaName;
}

const char* gate_residual(const void* args, int64_t begin, int64_t end) {
  return gated_forward<false>(args, begin, end);
}

const char* gate_residual_norm_modulate(const void* args, int64_t begin, int64_t end) {
  return gated_forward<true>(args, begin, end);
}

}  // namespace QIRL_ISA
}  // namespace qirl
